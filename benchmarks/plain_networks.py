"""Networks as published, in the form that benchmarks compare with: a video `B 3 T H W` in the network's range to the posterior mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model.definition import definition

if TYPE_CHECKING:
    from collections.abc import Mapping


class PlainNetwork(nn.Module):
    """The network `name` with these weights, run layer by layer."""

    def __init__(self, name: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.network = cast("Any", definition(name, config, weights))

    @torch.inference_mode()
    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W` -> `B d t h w`."""
        return cast("torch.Tensor", self.network.encode(video_BCTHW).mean)

"""The plain layer-by-layer networks by the name of their preset.

Takes published configuration and weights; returns a module that maps a video `B 3 T H W` in the network's range to the posterior mean
`B d t h w`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model import registry
from model.definition import definition

if TYPE_CHECKING:
    from collections.abc import Mapping


def build(name: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The plain form of a preset's network."""
    family = registry.family_of(name).name
    if family == "ivvae":
        from benchmarks.ivvae_plain import PlainIVVAE

        return PlainIVVAE(config, weights)
    return Mean(definition(name, config, weights))


class Mean(nn.Module):
    """Video `B 3 T H W` -> posterior mean of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B d t h w`."""
        return self.network.encode(video_BCTHW).mean

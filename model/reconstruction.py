"""Interface of trainable networks: a clip and noise in, a `Reconstruction` with gradients out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from model.interface import LatentSpec
    from model.posterior import Posterior


class Coefficients(NamedTuple):
    """Haar bands along the energy flow (WF-VAE section 3.2), in matching order."""

    encoder: Sequence[torch.Tensor]
    decoder: Sequence[torch.Tensor]

    def __repr__(self) -> str:
        return f"Coefficients({[tuple(bands.shape) for bands in self.encoder]})"


class Reconstruction(NamedTuple):
    """Output of a trainable network for a clip."""

    video_BCTHW: torch.Tensor  # float32, in `spec.value_range` but not clamped
    posterior: Posterior  # mean and log-variance `B d t h w`, float32
    coefficients: Coefficients | None = None

    def __repr__(self) -> str:
        return f"Reconstruction({tuple(self.video_BCTHW.shape)})"


class Trainable(Protocol):
    """Published network with gradients: an `nn.Module` whose `state_dict()` has exactly the published keys and shapes."""

    config: dict[str, Any]  # complete, in published keys
    spec: LatentSpec

    def __call__(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """Float `B 3 T H W` in `spec.value_range` -> Reconstruction of mean + deviation * noise, or of the mean if noise is None.

        Every parameter gets a gradient (zero if unused, never None), also for clips of one frame: data-parallel training and optimizers
        need it.

        Raises:
            ValueError: wrong rank, dtype, frame count or size.
        """
        ...

    def last_layer(self) -> nn.Parameter:
        """Last weight before the video's pixels, where adaptive weights compare gradients."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`."""
        ...

"""Input of a step of the fused encoder: float video `B 3 T H W` or uint8 YUV planes `B T 3 H W`, as rows of pixel blocks, one a token.

A block is in C order (rgb, frame, row, column); one product turns it into a token. Planes become RGB in the kernel that makes the blocks:
one affine map does the 3x3 matrix and the scaling into the network's range, then values are clamped to the gamut (docs/adr/0005).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from model.leanvae.network import patches_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from model.kernels import Kernels


class StepPixels(Protocol):
    """Frames of a step."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold them, batch first: inputs of a recorded step."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Videos, frames, height, width."""
        ...

    def rows(self, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Blocks of `depth` frames by `side` by `side` pixels of these frames: `(B*t*h*w, 3*depth*side*side)`."""
        ...

    def of(self, tensors: Sequence[torch.Tensor]) -> StepPixels:
        """Frames of the same kind from tensors shaped like `tensors`."""
        ...


@dataclass(frozen=True)
class FloatPixels:
    """Float video in the network's range and in the dtype of the product that reads it."""

    tensors: tuple[torch.Tensor, ...]  # the video

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `StepPixels`."""
        B, _, T, H, W = self.tensors[0].shape
        return B, T, H, W

    def rows(self, frames: slice, depth: int, side: int) -> torch.Tensor:
        """See `StepPixels`."""
        return patches_of(self.tensors[0][:, :, frames], depth, side).flatten(0, 3)

    def of(self, tensors: Sequence[torch.Tensor]) -> FloatPixels:
        """See `StepPixels`."""
        return FloatPixels(tuple(tensors))


@dataclass(frozen=True)
class PlanePixels:
    """Limited-range planes on the network's device, and the colour map `B 3 4` of each video (`model.colour.rgb_map`)."""

    tensors: tuple[torch.Tensor, ...]  # planes, colour maps
    value_range: tuple[float, float]
    dtype: torch.dtype
    kernels: Kernels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `StepPixels`."""
        B, T, _, H, W = self.tensors[0].shape
        return B, T, H, W

    def rows(self, frames: slice, depth: int, side: int) -> torch.Tensor:
        """See `StepPixels`."""
        planes, colours = self.tensors
        return self.kernels.planes_to_rows(planes[:, frames], colours, self.value_range, depth, side, self.dtype)

    def of(self, tensors: Sequence[torch.Tensor]) -> PlanePixels:
        """See `StepPixels`."""
        return replace(self, tensors=tuple(tensors))

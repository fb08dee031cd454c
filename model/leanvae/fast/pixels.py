"""LeanVAE's pixel input and output: float videos `B 3 T H W` or uint8 YUV planes `B T 3 H W`, as rows of pixel blocks, one block per token.

A block is in C order (rgb, frame, row, column); one product turns it into a token. Planes become RGB here, a few frames at a time: one
affine map does the 3x3 matrix and the scaling into the network's range, then values are clamped to the gamut (docs/adr/0005).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import torch

from model.colour import check_matrices, rgb_map, yuv_to_video

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.kernels import Kernels

FRAMES = 4  # frames of a token


class Pixels(Protocol):
    """Input frames of a batch of videos."""

    batch: int
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        ...

    def select_frames(self, frames: slice) -> Pixels:
        """These frames of the same videos."""
        ...

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Blocks of `depth` frames by `side` by `side` pixels from these videos and frames: `(b*t*h*w, 3*depth*side*side)`."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensors that hold the frames, batch first; the inverse of `from_tensors`."""
        ...

    def from_tensors(self, tensors: Sequence[torch.Tensor]) -> Pixels:
        """Frames of the same kind from tensors shaped like `tensors()`."""
        ...


class FloatPixels:
    """Float video `B 3 T H W` in the network's range, moved to `device` and `dtype` when a step needs it."""

    def __init__(self, video_BCTHW: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._video, self._device, self._dtype = video_BCTHW, device, dtype
        self.batch, self.frames = video_BCTHW.shape[0], video_BCTHW.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self._video.shape[3], self._video.shape[4]

    def select_frames(self, frames: slice) -> FloatPixels:
        """These frames of the same videos, on the network's device."""
        part = self._video[:, :, frames].to(self._device, self._dtype, non_blocking=True)
        return FloatPixels(part, self._device, self._dtype)

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Pixel blocks, see `Pixels.rows`."""
        return patchify(self._video[videos, :, frames], depth, side)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The video tensor."""
        return (self._video,)

    def from_tensors(self, tensors: Sequence[torch.Tensor]) -> FloatPixels:
        """Pixels of another video tensor."""
        return FloatPixels(tensors[0], self._device, self._dtype)


class PlanePixels:
    """Limited-range uint8 planes `B T 3 H W` on the network's device, converted a few frames at a time.

    Raises:
        ValueError: not one known colour matrix per video.
    """

    def __init__(
        self,
        planes_BT3HW: torch.Tensor,
        matrices: Sequence[str],
        value_range: tuple[float, float],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
    ) -> None:
        check_matrices(matrices, planes_BT3HW.shape[0])
        self._planes, self._matrices, self._range = planes_BT3HW, list(matrices), value_range
        self._dtype, self._kernels = dtype, kernels
        self.batch, self.frames = planes_BT3HW.shape[0], planes_BT3HW.shape[1]
        self._map_B34: torch.Tensor | None = None
        if kernels is not None:
            colours = rgb_map(matrices, value_range).float()
            self._map_B34 = colours.to(planes_BT3HW.device, non_blocking=True)  # must not wait for the device

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self._planes.shape[3], self._planes.shape[4]

    def select_frames(self, frames: slice) -> PlanePixels:
        """These frames of the same videos."""
        return self._with(self._planes[:, frames], self._map_B34)

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Pixel blocks in the network's range, see `Pixels.rows`."""
        planes = self._planes[videos, frames]
        if self._kernels is not None and self._map_B34 is not None:
            return self._kernels.planes_to_rows(planes, self._map_B34[videos], self._range, depth, side, self._dtype)
        return patchify(yuv_to_video(planes, self._matrices[videos], self._range, self._dtype), depth, side)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The planes, and the colour maps if kernels convert them."""
        return (self._planes,) if self._map_B34 is None else (self._planes, self._map_B34)

    def from_tensors(self, tensors: Sequence[torch.Tensor]) -> PlanePixels:
        """Pixels of other planes; the colour matrices are these, unless the tensors include colour maps, which may be of another batch."""
        return self._with(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def _with(self, planes_BT3HW: torch.Tensor, map_B34: torch.Tensor | None) -> PlanePixels:
        other = copy.copy(self)
        other._planes, other._map_B34 = planes_BT3HW, map_B34
        other.batch, other.frames = planes_BT3HW.shape[0], planes_BT3HW.shape[1]
        return other


def first_frame(row: int, image: bool) -> int:
    """Index of the first frame of a latent row; `image`: row 0 is a single frame."""
    return FRAMES * row - (FRAMES - 1) * image if row else 0


def groups(span: slice, image: bool) -> list[tuple[int, int, int]]:
    """Splits a span of latent rows into (start, stop, frames per token): row 0 of a video's first chunk is one frame, others four."""
    if not image or span.start > 0:
        return [(span.start, span.stop, FRAMES)]
    first = [(0, 1, 1)]
    return first if span.stop == 1 else [*first, (1, span.stop, FRAMES)]


def patchify(video_BCTHW: torch.Tensor, depth: int, side: int) -> torch.Tensor:
    """Pixel blocks as rows `(B*t*h*w, 3*depth*side*side)`, block in C order (rgb, frame, row, column)."""
    B, C, T, H, W = video_BCTHW.shape
    cells = video_BCTHW.reshape(B, C, T // depth, depth, H // side, side, W // side, side)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, C * depth * side * side)


def unpatchify(blocks_NP: torch.Tensor, depth: int, side: int, video_BCTHW: torch.Tensor) -> None:
    """Inverse of `patchify`, written into `video_BCTHW`."""
    B, C, T, H, W = video_BCTHW.shape
    cells = blocks_NP.view(B, T // depth, H // side, W // side, C, depth, side, side)
    video_BCTHW.copy_(cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, C, T, H, W))

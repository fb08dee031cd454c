"""Where LeanVAE's pixels come from and go to: float videos or uint8 YUV planes, a block of pixels per token.

Enters: a video `B 3 T H W` or planes `B T 3 H W` with the matrix of each video. Leaves: rows of pixel blocks, one per token, block in C
order (rgb, frame, row, column), which one product turns into tokens. Planes become RGB only here, a few frames at a time: the 3x3
matrix and the gamut clamp; the scaling into a network's range is part of the same map (docs/adr/0005).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from model.colour import check_matrices, rgb_map, yuv_to_video

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.kernels import Kernels

FRAMES = 4  # of one token


class Pixels(Protocol):
    """Frames of a batch of videos, on their way in."""

    batch: int
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        ...

    def cut(self, frames: slice) -> Pixels:
        """The same videos, fewer frames."""
        ...

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Blocks of `depth` frames by `side` by `side` pixels of a part of the videos: `(b*t*h*w, 3*depth*side*side)`."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the frames are made of, batch first; `of_tensors` puts it together again."""
        ...

    def of_tensors(self, tensors: Sequence[torch.Tensor]) -> Pixels:
        """Frames of the same kind from tensors shaped like `tensors()`."""
        ...


class FloatPixels:
    """A float video `B 3 T H W` in the network's range, moved to `device` and `dtype` when a step needs it."""

    def __init__(self, video_BCTHW: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._video, self._device, self._dtype = video_BCTHW, device, dtype
        self.batch, self.frames = video_BCTHW.shape[0], video_BCTHW.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self._video.shape[3], self._video.shape[4]

    def cut(self, frames: slice) -> FloatPixels:
        """The same videos, fewer frames, on the network's device."""
        part = self._video[:, :, frames].to(self._device, self._dtype, non_blocking=True)
        return FloatPixels(part, self._device, self._dtype)

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Pixel blocks as `Pixels.rows` says."""
        return patchify(self._video[videos, :, frames], depth, side)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The video."""
        return (self._video,)

    def of_tensors(self, tensors: Sequence[torch.Tensor]) -> FloatPixels:
        """Another video."""
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
            self._map_B34 = colours.to(planes_BT3HW.device, non_blocking=True)  # nothing here waits for the device

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self._planes.shape[3], self._planes.shape[4]

    def cut(self, frames: slice) -> PlanePixels:
        """The same videos, fewer frames."""
        return self._with(self._planes[:, frames], self._map_B34)

    def rows(self, videos: slice, frames: slice, depth: int, side: int) -> torch.Tensor:
        """Pixel blocks as `Pixels.rows` says, in the network's range."""
        planes = self._planes[videos, frames]
        if self._kernels is not None and self._map_B34 is not None:
            return self._kernels.planes_to_rows(planes, self._map_B34[videos], self._range, depth, side, self._dtype)
        return patchify(yuv_to_video(planes, self._matrices[videos], self._range, self._dtype), depth, side)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The planes, and where kernels convert them the matrices."""
        return (self._planes,) if self._map_B34 is None else (self._planes, self._map_B34)

    def of_tensors(self, tensors: Sequence[torch.Tensor]) -> PlanePixels:
        """Other planes, of the same matrices unless those are among the tensors."""
        return self._with(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def _with(self, planes_BT3HW: torch.Tensor, map_B34: torch.Tensor | None) -> PlanePixels:
        other = PlanePixels(planes_BT3HW, self._matrices, self._range, self._dtype)
        other._kernels, other._map_B34 = self._kernels, map_B34
        return other


def first_frame(row: int, image: bool) -> int:
    """Frame at which a latent row begins; `image` says that row 0 is a single frame."""
    return FRAMES * row - (FRAMES - 1) * image if row else 0


def groups(span: slice, image: bool) -> list[tuple[int, int, int]]:
    """A span of latent rows as (start, stop, frames of a token): row 0 of a video's first chunk is one frame, all others four."""
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
    """Inverse of `patchify`, into existing memory."""
    B, C, T, H, W = video_BCTHW.shape
    cells = blocks_NP.view(B, T // depth, H // side, W // side, C, depth, side, side)
    video_BCTHW.copy_(cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, C, T, H, W))

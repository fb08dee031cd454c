"""Downsampling and upsampling by 2 in space and time, with weights prepared for speed, on the residual stream `T B H W 2c` (sections 2, 8).

Folded, exact up to rounding. Down: the motion branch's kernel over two frames is folded into its spatial one, and frames of the key branch
that are not read are not computed. Up: nearest-neighbour doubling and the 3x3 kernel after it are four 2x2 kernels on the small grid, one
per corner of a doubled pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from model.convolution import FrameConv
from model.ivvae.fast.stream_state import stripes

if TYPE_CHECKING:
    from torch import nn

    from model.ivvae import layers as published
    from model.ivvae.fast.stream_state import StreamState


class Downsample:
    """Downsampling by 2 of rows and columns, and of frames if `time`; a clip's first frame stays one frame."""

    def __init__(self, block: published.Resample, device: torch.device, dtype: torch.dtype) -> None:
        spatial, motion = _kernels(block)
        self.spatial, self.motion = (
            FrameConv(weight, bias, device, dtype, stride=2) for weight, bias in (spatial, motion)
        )
        time_conv = cast("nn.Conv3d | None", getattr(block, "time_conv", None))
        self.time = time_conv is not None
        if time_conv is not None:
            over_two, bias = time_conv.weight.double()[..., 0, 0], cast("torch.Tensor", time_conv.bias).double()
            kernel = torch.cat([torch.einsum("om,mikl->oikl", tap, motion[0]) for tap in over_two.unbind(2)], dim=1)
            self.two_frames = FrameConv(kernel, bias + over_two.sum(2) @ motion[1], device, dtype, stride=2)

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2c)` -> `(T or T/2, B, H/2, W/2, 2c)`."""
        T, B, H, W, channels = x_TBHWC.shape
        c, step = channels // 2, 2 if self.time and not stream.first else 1
        out = x_TBHWC.new_empty((T // step, B, H // 2, W // 2, channels))
        for top, end in stripes(H // 2, W // 2, stream.device):
            source = x_TBHWC[:, :, 2 * top : 2 * end + 1]
            spatial = [source[::step, ..., :c]]
            motion = [source[k::step, ..., c:] for k in range(step)]
            out[:, :, top:end, :, :c] = self._conv(self.spatial, spatial, 2 * (end - top), stream)
            out[:, :, top:end, :, c:] = self._conv(
                self.motion if step == 1 else self.two_frames, motion, 2 * (end - top), stream
            )
        return out

    @staticmethod
    def _conv(conv: FrameConv, parts: list[torch.Tensor], rows: int, stream: StreamState) -> torch.Tensor:
        """Concatenates parts along channels, pads zeros right and below, and convolves."""
        T, B, height, W, c = parts[0].shape
        padded = torch.empty((T * B, rows + 1, W + 1, c * len(parts)), dtype=stream.dtype, device=stream.device)
        padded[:, :, W].zero_()
        padded[:, height:].zero_()
        for index, part in enumerate(parts):
            padded[:, :height, :W, index * c : (index + 1) * c].unflatten(0, (T, B)).copy_(part)
        return conv(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (T, B))


class Upsample:
    """Upsampling by 2 of rows and columns with half the channels, and of frames if `time`; a clip's first latent stays one frame."""

    def __init__(self, block: published.Resample, device: torch.device, dtype: torch.dtype) -> None:
        spatial, motion = _kernels(block)
        self.spatial, self.motion = (
            [_corners(weight, bias, row, device, dtype) for row in (0, 1)] for weight, bias in (spatial, motion)
        )
        self.width = int(spatial[0].shape[0])
        time_conv = cast("nn.Conv3d | None", getattr(block, "time_conv", None))
        self.time = time_conv is not None
        if time_conv is not None:
            self.two_frames = FrameConv(time_conv.weight[..., 0], time_conv.bias, device, dtype)

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2c)` -> `(T or 2T, B, 2H, 2W, c)`."""
        T, B, H, W, channels = x_TBHWC.shape
        c, step = channels // 2, 2 if self.time and not stream.first else 1
        out = x_TBHWC.new_empty((T, step, B, 2 * H, 2 * W, 2 * self.width))
        for top, end in stripes(H, W, stream.device):
            above, below = max(top - 1, 0), min(end + 1, H)
            source = x_TBHWC[:, :, above:below]
            place = slice(
                above - top + 1, below - top + 1
            )  # these rows within a window that has one more row on each side
            spatial = source[..., :c][:, None]
            motion = source[..., c:][:, None] if step == 1 else self._doubled(source[..., c:])
            target = out[:, :, :, 2 * top : 2 * end]
            self._conv(self.spatial, spatial, place, target[..., : self.width], stream)
            self._conv(self.motion, motion, place, target[..., self.width :], stream)
        return out.flatten(0, 1)

    def _doubled(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        """`(T, B, H, W, c)` -> `(T, 2, B, H, W, c)`."""
        y = self.two_frames(x_TBHWC.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y.unflatten(0, x_TBHWC.shape[:2]).unflatten(-1, (2, -1)).movedim(-2, 1)

    def _conv(
        self, corners: list[FrameConv], x: torch.Tensor, place: slice, out: torch.Tensor, stream: StreamState
    ) -> None:
        """`x` `(T, n, B, rows, W, c)` -> `out` `(T, 1 or 2, B, 2 rows, 2 W, width)`; one frame of `x` may fill two of `out`."""
        T, n, B, _, W, c = x.shape
        rows = out.shape[3] // 2
        window = torch.zeros((T * n * B, rows + 2, W, c), dtype=stream.dtype, device=stream.device)
        window[:, place].unflatten(0, (T, n, B)).copy_(x)
        for row, conv in enumerate(corners):
            y = conv(window[:, row : row + rows + 1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (T, n, B))
            out[:, :, :, row::2, 0::2] = y[..., :W, : self.width]
            out[:, :, :, row::2, 1::2] = y[..., 1:, self.width :]


def _kernels(block: published.Resample) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of the key branch and of the motion branch, float64."""
    convs = [cast("nn.Conv2d", half[1]) for half in (block.resample_2d, block.resample_3d)]
    return [(conv.weight.double(), cast("torch.Tensor", conv.bias).double()) for conv in convs]


def _corners(weight: torch.Tensor, bias: torch.Tensor, row: int, device: torch.device, dtype: torch.dtype) -> FrameConv:
    """Kernels of a doubled pixel's upper (0) or lower (1) corners, the left one first; 2x2 each, with bordered columns."""
    upper = _halved(weight, 2, row)
    return FrameConv(
        torch.cat([_halved(upper, 3, column) for column in (0, 1)]),
        torch.cat([bias, bias]),
        device,
        dtype,
        padding=(0, 1),
    )


def _halved(weight: torch.Tensor, axis: int, side: int) -> torch.Tensor:
    """Reduces three taps on the doubled grid to two on the small one: the two that fall on the same pixel are summed."""
    a, b, c = weight.split(1, dim=axis)
    return torch.cat([a, b + c] if side == 0 else [a + b, c], dim=axis)

"""Layers of WF-VAE and WFVAE2 as published, under their published names (WF-VAE section 3, arXiv 2411.17459).

Videos `B C T H W`. Convolutions over frames are causal. Convolutions and attention compute in 16 bits if weights have them or under
`torch.autocast`; norms and the residual stream stay float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, activated, at_least_float32, own_autocast, per_frame, without_autocast
from model.wfvae.facts import GROUPS
from model.wfvae.wavelets import repeat_first

EPS = 1e-6


class LayerNorm(nn.Module):
    """LayerNorm over the channels of a position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> `B C T H W`."""
        norm, x_BTHWC = self.norm, x_BCTHW.permute(0, 2, 3, 4, 1)
        weight, bias = norm.weight.to(x_BCTHW.dtype), norm.bias.to(x_BCTHW.dtype)
        return F.layer_norm(x_BTHWC, norm.normalized_shape, weight, bias, EPS).permute(0, 4, 1, 2, 3)


class GroupNorm(nn.GroupNorm):
    """Norm of groups of channels over all positions of a video; `each_frame`: of a frame."""

    def __init__(self, channels: int, *, each_frame: bool) -> None:
        super().__init__(GROUPS, channels, eps=EPS)
        self.each_frame = each_frame

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> `B C T H W`."""
        weight, bias = self.weight.to(x_BCTHW.dtype), self.bias.to(x_BCTHW.dtype)
        if self.each_frame:
            return per_frame(lambda x_NCHW: F.group_norm(x_NCHW, GROUPS, weight, bias, EPS), x_BCTHW)
        return F.group_norm(x_BCTHW, GROUPS, weight, bias, EPS)


def normaliser(kind: str, channels: int, *, each_frame: bool = False) -> nn.Module:
    """Norm of kind `layernorm` or `groupnorm`."""
    return LayerNorm(channels) if kind == "layernorm" else GroupNorm(channels, each_frame=each_frame)


class CausalConv3d(nn.Module):
    """Causal convolution (section 3.3), zero padding in space (none with a stride). `full_precision`: products stay in at least float32.

    A video begins with `kernel - 1` copies of frame 0. A later step needs the last `kernel - stride` frames (causal cache, equation 4).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, full_precision: bool = False
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, (0, padding, padding))
        self.past, self.full_precision = kernel - stride, full_precision

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> as many frames of the same size; with stride 2 `(T+1)/2` frames at the start of a video, then `T/2`."""
        with own_autocast(self, x_BCTHW):
            x_BCTHW = x_BCTHW.to(self.conv.weight.dtype)
            if self.past:
                x_BCTHW = history.extend(x_BCTHW, self.past, axis=2, start="first")
            if history.first:
                x_BCTHW = repeat_first(x_BCTHW, self.conv.stride[0] - 1)
            return cast("torch.Tensor", self.conv(x_BCTHW))


class FrameConv(nn.Conv2d):
    """Convolution of each frame, zero padding (none with a stride). `full_precision`: products stay in at least float32."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, full_precision: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2 if stride == 1 else 0)
        self.full_precision = full_precision

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> as many frames."""
        with own_autocast(self, x_BCTHW):
            return per_frame(super().forward, x_BCTHW.to(self.weight.dtype))


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input, or to its 1x1 convolution. Over frames if `over_time`, else of each frame."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, over_time: bool = True) -> None:
        super().__init__()
        conv, each_frame = CausalConv3d if over_time else FrameConv, not over_time
        self.norm1 = normaliser(norm, in_channels, each_frame=each_frame)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = normaliser(norm, out_channels, each_frame=each_frame)
        self.conv2 = conv(out_channels, out_channels)
        self.nin_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> the same with `out_channels`."""
        h = self.conv1(activated(x_BCTHW, self.norm1), history)
        h = self.conv2(activated(h, self.norm2), history)
        return at_least_float32(x_BCTHW if self.nin_shortcut is None else self.nin_shortcut(x_BCTHW)) + h


class Attention(nn.Module):
    """Attention of one head within each frame. `mixes_frames`: the older form, which reads `B C T` as `(B T) C`."""

    def __init__(self, channels: int, norm: str, *, mixes_frames: bool) -> None:
        super().__init__()
        self.mixes_frames = mixes_frames
        self.norm = normaliser(norm, channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> `B C T H W`."""
        h = without_autocast(self.norm, x_BCTHW)
        q, k, v = (self._tokens(conv(h)) for conv in (self.q, self.k, self.v))
        y_NCP = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        B, C, T, H, W = x_BCTHW.shape
        y = y_NCP.reshape(B, C, T, H, W) if self.mixes_frames else y_NCP.reshape(B, T, C, H, W).transpose(1, 2)
        return at_least_float32(x_BCTHW) + self.proj_out(y)

    def _tokens(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """Positions of a frame as tokens of one head, `(B T) 1 (H W) C`."""
        x = x_BCTHW if self.mixes_frames else x_BCTHW.transpose(1, 2)
        return x.reshape(-1, x_BCTHW.shape[1], x_BCTHW.shape[3] * x_BCTHW.shape[4]).transpose(1, 2)[:, None]


def middle(
    kinds: tuple[str, ...], norm: str, channels: int, *, before: int | None = None, after: int | None = None
) -> nn.Sequential:
    """Middle blocks of published kinds, `channels` wide; `before` and `after`: input and output widths where they differ."""
    widths = [before or channels, *[channels] * (len(kinds) - 1), after or channels]
    return nn.Sequential(
        *(
            Residual(width_in, width_out, norm)
            if kind == "ResnetBlock3D"
            else Attention(width_out, norm, mixes_frames=kind == "AttnBlock3D")
            for kind, (width_in, width_out) in zip(kinds, pairwise(widths), strict=True)
        )
    )


class Downsample(nn.Module):
    """Half the size: zeros at the right and bottom edge, stride 2 in space; `over_time`: in time too."""

    def __init__(self, channels: int, *, over_time: bool) -> None:
        super().__init__()
        conv = CausalConv3d if over_time else FrameConv
        self.conv = conv(channels, channels, stride=2)

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> `B C T H/2 W/2`, or with the frames of `CausalConv3d`."""
        return cast("torch.Tensor", self.conv(F.pad(x_BCTHW, (0, 1, 0, 1)), history))


class Upsample(nn.Module):
    """Twice the size (nearest), then a convolution. `over_time`: frames after frame 0 twice (`interpolation`), then in space bilinear."""

    def __init__(self, channels: int, *, over_time: bool, interpolation: str) -> None:
        super().__init__()
        self.interpolation = interpolation
        self.conv = CausalConv3d(channels, channels) if over_time else FrameConv(channels, channels)

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> `B C T 2H 2W`, or with the frames of `_doubled`."""
        if isinstance(self.conv, FrameConv):
            return self.conv(per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0), x_BCTHW))
        doubled = self._doubled(at_least_float32(x_BCTHW), history)
        larger = per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0, mode="bilinear"), doubled)
        return cast("torch.Tensor", self.conv(larger, history))

    def _doubled(self, x_BCTHW: torch.Tensor, history: History) -> torch.Tensor:
        """Frame 0 once, the others twice: `2T-1` frames, of later steps `2T`.

        Linear interpolation needs the next frame, so every step but the last returns one frame less, and the next one begins with it.
        """
        frames, returned = x_BCTHW[:, :, int(history.first) :], 0
        if self.interpolation == "trilinear":
            held = history.take()
            if held is not None:
                frames, returned = torch.cat([held, frames], dim=2), held.shape[2]
            history.keep(frames[:, :, -1:])
        if not frames.shape[2]:
            return x_BCTHW
        doubled = F.interpolate(frames, scale_factor=(2.0, 1.0, 1.0), mode=self.interpolation)
        held_back = int(self.interpolation == "trilinear" and not history.last)
        doubled = doubled[:, :, returned : doubled.shape[2] - held_back]
        return torch.cat([x_BCTHW[:, :, :1], doubled], dim=2) if history.first else doubled


def add_low(bands_BCTHW: torch.Tensor, image_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
    """Adds the image of the deeper level to the low band (section 3.2, equation 2; at the output equation 3).

    Between steps images wait for the bands, which are late by the frames that interpolation holds back.
    """
    waiting, frames = history.take(), bands_BCTHW.shape[2]
    image_BCTHW = image_BCTHW if waiting is None else torch.cat([waiting, image_BCTHW], dim=2)
    history.keep(image_BCTHW[:, :, frames:])
    low = bands_BCTHW[:, :COLOURS] + image_BCTHW[:, :, :frames]
    return torch.cat([low, bands_BCTHW[:, COLOURS:]], dim=1)

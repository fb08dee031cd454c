"""Layers of WF-VAE and WFVAE2 as published, under their published names (WF-VAE section 3, arXiv 2411.17459).

Videos `B C T H W`. Convolutions over frames are causal: they see the first frame repeated in front. Haar filters are buffers, so that
`parameters()` are the trained ones, as in the published EMA files. Under `torch.autocast` convolutions and attention run in 16 bits,
norms and the residual stream stay float32.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, at_least_float32, no_autocast, own_autocast, per_frame, recomputed, without_autocast
from model.wfvae.facts import GROUPS
from model.wfvae.wavelets import PLANE_BANDS, VOLUME_BANDS, default_filter

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
    """Norm of groups of channels over all positions of a video or, of `N C H W`, of each frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shape of `x`."""
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def normaliser(kind: str, channels: int) -> nn.Module:
    """Norm of kind `layernorm` or `groupnorm`."""
    return LayerNorm(channels) if kind == "layernorm" else GroupNorm(GROUPS, channels, eps=EPS)


def normed(x_BCTHW: torch.Tensor, norm: nn.Module, *, each_frame: bool = False) -> torch.Tensor:
    """The norm in at least float32; with `each_frame` groups have statistics of each frame."""
    if each_frame and isinstance(norm, GroupNorm):
        return without_autocast(lambda x: per_frame(norm, x), x_BCTHW)
    return without_autocast(norm, x_BCTHW)


def activated(x_BCTHW: torch.Tensor, norm: nn.Module, *, each_frame: bool = False) -> torch.Tensor:
    """Norm and SiLU, run again in the backward pass: little work, much memory."""
    return recomputed(True, lambda x: F.silu(normed(x, norm, each_frame=each_frame)), x_BCTHW)


class CausalConv3d(nn.Module):
    """Convolution over frames, zero padding in space (none with a stride). Before the first frame it sees copies of it.

    `full_precision`: products stay in at least float32.
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
    """Residual block of two convolutions, over frames if `over_time`, else of each frame."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, over_time: bool = True) -> None:
        super().__init__()
        conv = CausalConv3d if over_time else FrameConv
        self.each_frame = not over_time
        self.norm1, self.conv1 = normaliser(norm, in_channels), conv(in_channels, out_channels)
        self.norm2, self.conv2 = normaliser(norm, out_channels), conv(out_channels, out_channels)
        self.nin_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B C T H W` -> the same with `out_channels`."""
        h = self.conv1(activated(x_BCTHW, self.norm1, each_frame=self.each_frame), history)
        h = self.conv2(activated(h, self.norm2, each_frame=self.each_frame), history)
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
        h = normed(x_BCTHW, self.norm)
        q, k, v = (self._tokens(conv(h)) for conv in (self.q, self.k, self.v))
        y_NCP = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        B, C, T, H, W = x_BCTHW.shape
        y = y_NCP.reshape(B, C, T, H, W) if self.mixes_frames else y_NCP.reshape(B, T, C, H, W).transpose(1, 2)
        return at_least_float32(x_BCTHW) + self.proj_out(y)

    def _tokens(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """Positions of a frame as tokens of one head, `(B T) 1 (H W) C`."""
        x = x_BCTHW if self.mixes_frames else x_BCTHW.transpose(1, 2)
        return x.reshape(-1, x_BCTHW.shape[1], x_BCTHW.shape[3] * x_BCTHW.shape[4]).transpose(1, 2)[:, None]


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
    """Twice the size; `over_time`: frame 0 in space only, the other frames in time (`interpolation`) and then in space."""

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


class Analysis(nn.Module):
    """Forward Haar transform, over frames if `over_time`, else of each frame, without autocast."""

    def __init__(self, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        for name in VOLUME_BANDS if over_time else PLANE_BANDS:
            if over_time:
                self.add_module(f"{name}_conv", _Filter(name))
            else:
                self.register_buffer(name, default_filter(f"wavelet_transform.{name}"))

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B 3 T H W` -> bands `B 24 T' H/2 W/2`, or of each frame `B 12 T H/2 W/2`. Channel = 3 * band + colour."""
        if self.over_time:
            kernel = torch.cat([self.get_buffer(f"{name}_conv.conv.weight") for name in VOLUME_BANDS])
            x_BCTHW = repeat_first(x_BCTHW, int(history.first))  # frames are then read in pairs: none is kept
        else:
            kernel = torch.cat([self.get_buffer(name) for name in PLANE_BANDS])[:, :, None]
        with no_autocast(x_BCTHW):  # coefficients would lose bits in bfloat16
            x_BCTHW = at_least_float32(x_BCTHW)
            bands = F.conv3d(x_BCTHW.flatten(0, 1)[:, None], kernel.to(x_BCTHW.dtype), stride=kernel.shape[2:])
        return bands.unflatten(0, (-1, COLOURS)).transpose(1, 2).flatten(1, 2)


class _Filter(nn.Module):
    """Filter of one band; published as the kernel of a causal convolution."""

    def __init__(self, band: str) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.register_buffer("weight", default_filter(f"wavelet_transform.{band}"))


class Synthesis(nn.Module):
    """Inverse Haar transform, in at least float32; over frames it drops its first frame."""

    def __init__(self, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        for name in VOLUME_BANDS if over_time else PLANE_BANDS:
            self.register_buffer(name, default_filter(f"wavelet_transform.{name}"))

    def forward(self, bands_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """Bands -> `B 3 T H W`."""
        kernel = torch.cat([self.get_buffer(name) for name in (VOLUME_BANDS if self.over_time else PLANE_BANDS)])
        kernel = kernel if self.over_time else kernel[:, :, None]
        colours = at_least_float32(bands_BCTHW).unflatten(1, (-1, COLOURS)).transpose(1, 2).flatten(0, 1)
        with no_autocast(bands_BCTHW):
            image = F.conv_transpose3d(colours, kernel.to(colours), stride=kernel.shape[2:])
        return image.unflatten(0, (-1, COLOURS)).squeeze(2)[:, :, int(self.over_time and history.first) :]


def repeat_first(x_BCTHW: torch.Tensor, copies: int) -> torch.Tensor:
    """Repeats the first frame in front."""
    return torch.cat([x_BCTHW[:, :, :1]] * copies + [x_BCTHW], dim=2) if copies else x_BCTHW


def add_low(bands_BCTHW: torch.Tensor, image_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
    """Adds the image of the level below to the low band (equation 2).

    Between steps images wait for the bands, which are late by the frames that interpolation holds back.
    """
    waiting, frames = history.take(), bands_BCTHW.shape[2]
    image_BCTHW = image_BCTHW if waiting is None else torch.cat([waiting, image_BCTHW], dim=2)
    history.keep(image_BCTHW[:, :, frames:])
    low = bands_BCTHW[:, :COLOURS] + image_BCTHW[:, :, :frames]
    return torch.cat([low, bands_BCTHW[:, COLOURS:]], dim=1)

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

from model.layers import COLOURS, at_least_float32, for_weights, no_autocast, per_frame, recomputed, without_autocast
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
    """Convolution over frames: two copies of the first frame in front, zero padding in space. A 1x1x1 kernel sees no past."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> as many frames of the same size."""
        conv = self.conv
        x_BCTHW = for_weights(x_BCTHW, conv.weight)
        if conv.kernel_size[0] == 1:
            return F.conv3d(x_BCTHW, conv.weight, conv.bias)
        return F.conv3d(repeat_first(x_BCTHW, 2), conv.weight, conv.bias, padding=(0, 1, 1))


class FrameConv(nn.Conv2d):
    """Convolution of each frame, zero padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> as many frames of the same size."""
        return per_frame(super().forward, for_weights(x_BCTHW, self.weight))


class Residual(nn.Module):
    """Residual block of two convolutions, over frames if `over_time`, else of each frame."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, over_time: bool = True) -> None:
        super().__init__()
        conv = CausalConv3d if over_time else FrameConv
        self.each_frame = not over_time
        self.norm1, self.conv1 = normaliser(norm, in_channels), conv(in_channels, out_channels)
        self.norm2, self.conv2 = normaliser(norm, out_channels), conv(out_channels, out_channels)
        self.nin_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> the same with `out_channels`."""
        h = self.conv1(activated(x_BCTHW, self.norm1, each_frame=self.each_frame))
        h = self.conv2(activated(h, self.norm2, each_frame=self.each_frame))
        return at_least_float32(x_BCTHW if self.nin_shortcut is None else self.nin_shortcut(x_BCTHW)) + h


class Attention(nn.Module):
    """Attention of one head within each frame. `mixes_frames`: the older form, which reads `B C T` as `(B T) C`."""

    def __init__(self, channels: int, norm: str, *, mixes_frames: bool) -> None:
        super().__init__()
        self.mixes_frames = mixes_frames
        self.norm = normaliser(norm, channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
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
        self.conv = CausalConv3d(channels, channels) if over_time else nn.Conv2d(channels, channels, 3)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> `B C T H/2 W/2`, or with `(T+1)/2` frames."""
        conv = self.conv.conv if isinstance(self.conv, CausalConv3d) else self.conv
        padded, weight, bias = F.pad(for_weights(x_BCTHW, conv.weight), (0, 1, 0, 1)), conv.weight, conv.bias
        if isinstance(self.conv, CausalConv3d):
            return F.conv3d(repeat_first(padded, 2), weight, bias, stride=2)
        return per_frame(lambda x_NCHW: F.conv2d(x_NCHW, weight, bias, stride=2), padded)


class Upsample(nn.Module):
    """Twice the size; `over_time`: frame 0 in space only, the other frames in time (`interpolation`) and then in space."""

    def __init__(self, channels: int, *, over_time: bool, interpolation: str) -> None:
        super().__init__()
        self.interpolation = interpolation
        self.conv = CausalConv3d(channels, channels) if over_time else FrameConv(channels, channels)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> `B C T 2H 2W`, or with `2T-1` frames."""
        if isinstance(self.conv, FrameConv):
            return self.conv(per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0), x_BCTHW))
        x_BCTHW = at_least_float32(x_BCTHW)
        if x_BCTHW.shape[2] > 1:
            rest = F.interpolate(x_BCTHW[:, :, 1:], scale_factor=(2.0, 1.0, 1.0), mode=self.interpolation)
            x_BCTHW = torch.cat([x_BCTHW[:, :, :1], rest], dim=2)
        larger = per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0, mode="bilinear"), x_BCTHW)
        return cast("torch.Tensor", self.conv(larger))


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

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W` -> bands `B 24 T' H/2 W/2`, or of each frame `B 12 T H/2 W/2`. Channel = 3 * band + colour."""
        if self.over_time:
            kernel = torch.cat([self.get_buffer(f"{name}_conv.conv.weight") for name in VOLUME_BANDS])
            x_BCTHW = repeat_first(x_BCTHW, 1)
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

    def forward(self, bands_BCTHW: torch.Tensor) -> torch.Tensor:
        """Bands -> `B 3 T H W`."""
        kernel = torch.cat([self.get_buffer(name) for name in (VOLUME_BANDS if self.over_time else PLANE_BANDS)])
        kernel = kernel if self.over_time else kernel[:, :, None]
        colours = at_least_float32(bands_BCTHW).unflatten(1, (-1, COLOURS)).transpose(1, 2).flatten(0, 1)
        with no_autocast(bands_BCTHW):
            image = F.conv_transpose3d(colours, kernel.to(colours), stride=kernel.shape[2:])
        return image.unflatten(0, (-1, COLOURS)).squeeze(2)[:, :, int(self.over_time) :]


def repeat_first(x_BCTHW: torch.Tensor, copies: int) -> torch.Tensor:
    """Repeats the first frame in front."""
    return torch.cat([x_BCTHW[:, :, :1]] * copies + [x_BCTHW], dim=2)


def add_low(bands_BCTHW: torch.Tensor, image_BCTHW: torch.Tensor) -> torch.Tensor:
    """Adds the image of the level below to the low band (equation 2)."""
    return torch.cat([bands_BCTHW[:, :COLOURS] + image_BCTHW, bands_BCTHW[:, COLOURS:]], dim=1)

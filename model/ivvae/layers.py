"""Layers of IV-VAE as published, under their published names (section 3 of the paper; group causal convolution: supplement 2.1).

Videos have frames first, `B T C H W`, so that using them as the batch is a view. "Width c" means channels of a branch: features have 2c
channels, those of the key-frame (2-D) branch first, then those of the motion (3-D) branch.

The published code processes groups of frames in turn and keeps the last frame of each layer. Here a pair of convolutions is one
convolution of each frame that gives the 2-D output and the product of each tap of the 3-D kernel; the products are summed over
neighbouring frames, so that the whole video is processed at once. Under `torch.autocast` convolutions and attention run in 16 bits, norms
and the residual stream stay float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import at_least_float32, for_weights, recomputed, with_zero_gradient

DILATIONS = (1, 3, 6, 9, 12)  # of the 3x3 convolutions in the encoder's head, which follow a 1x1


class NormGain(nn.Module):
    """RMS norm without epsilon of the channels of each half at a position, times gamma, which has `axes` trailing axes of one."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))

    def forward(self, x_BTCHW: torch.Tensor, *, halves: int = 2) -> torch.Tensor:
        """In at least float32; with `halves=1` one norm over all channels."""
        parts = at_least_float32(x_BTCHW).unflatten(2, (halves, -1))
        unit = F.normalize(parts, dim=3) * parts.shape[3] ** 0.5
        return unit.flatten(2, 3) * self.gamma.flatten()[:, None, None]


class ConvPair(nn.Module):
    """2-D and 3-D convolution that both read every channel (group causal convolution; published as `Sep_Conv3d`), 3x3(x3) or 1x1(x1).

    A frame's 3-D output reads the frame before (frame 0 reads itself instead), itself, and the next frame of its group; `group` frames
    to a group after frame 0.
    """

    def __init__(self, channels_in: int, width_out: int, size: int, group: int = 1) -> None:
        super().__init__()
        self.group = group
        self.conv_2d = nn.Conv2d(channels_in, width_out, size)
        self.conv_3d = nn.Conv3d(channels_in, width_out, size)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> 2-D outputs, then 3-D ones, `B T 2*width H W`."""
        flat, deep = self.conv_2d, self.conv_3d
        if flat.kernel_size[0] == 1:
            weight = torch.cat([flat.weight, deep.weight.squeeze(2)])
            return _per_frame(x_BTCHW, weight, torch.cat([_bias(flat), _bias(deep)]))
        weight = torch.cat([flat.weight, *deep.weight.unbind(2)])
        zeros = deep.weight.new_zeros(deep.out_channels)
        y = _per_frame(x_BTCHW, weight, torch.cat([_bias(flat), zeros, _bias(deep), zeros]), padding=1)
        key, to_next, present, to_previous = y.split([flat.out_channels, *[deep.out_channels] * 3], dim=2)
        # whether frame 1, 2, ... is the first of its group
        begins = torch.arange(x_BTCHW.shape[1] - 1, device=x_BTCHW.device) % self.group == 0
        following = to_previous[:, 1:].masked_fill(begins[:, None, None, None], 0.0)
        before = torch.cat([to_next[:, :1], to_next[:, :-1]], dim=1)
        return torch.cat([key, before + present + F.pad(following, (0, 0, 0, 0, 0, 0, 0, 1))], dim=2)


class FrameConv2d(nn.Module):
    """Convolution of each frame over both branches, zero padding (published as `Sep_Conv2d`)."""

    def __init__(self, channels_in: int, channels_out: int, size: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size, padding=dilation * (size // 2), dilation=dilation)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> as many frames of the same size."""
        conv = self.conv
        return _per_frame(x_BTCHW, conv.weight, conv.bias, padding=conv.padding[0], dilation=conv.dilation[0])


class _Residual(nn.Module):
    """Norm, SiLU, convolution, norm, SiLU, (dropout), convolution, added to the input or a shortcut of it."""

    def __init__(self, channels_in: int, channels_out: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        none = nn.Identity()  # SiLU and dropout have no parameters
        norms = NormGain(channels_in, 3), NormGain(channels_out, 3)
        self.residual = nn.Sequential(norms[0], none, first, norms[1], none, none, second)
        self.shortcut: nn.Module | None = None

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> `B T C' H W`."""
        layers = self.residual
        h = layers[2](activated(x_BTCHW, layers[0]))
        h = layers[6](activated(h, layers[3]))
        return at_least_float32(x_BTCHW if self.shortcut is None else self.shortcut(x_BTCHW)) + h


class Residual3d(_Residual):
    """Residual block of pairs of convolutions; a 1x1 shortcut if the width changes."""

    def __init__(self, width_in: int, width_out: int, group: int) -> None:
        pairs = ConvPair(2 * width_in, width_out, 3, group), ConvPair(2 * width_out, width_out, 3, group)
        super().__init__(2 * width_in, 2 * width_out, *pairs)
        if width_in != width_out:
            self.shortcut = ConvPair(2 * width_in, width_out, 1)


class Residual2d(_Residual):
    """Residual block of convolutions of single frames; the width does not change."""

    def __init__(self, width: int) -> None:
        c = 2 * width
        super().__init__(c, c, FrameConv2d(c, c, 3), FrameConv2d(c, c, 3))


class BranchAttention(nn.Module):
    """Attention of one branch within each frame, one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = NormGain(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` of one branch -> what is added to it."""
        normed = self.norm(x_BTCHW, halves=1)
        qkv = _per_frame(normed, self.to_qkv.weight, self.to_qkv.bias).flatten(0, 1).flatten(2).transpose(1, 2)
        q, k, v = qkv[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return _per_frame(mixed.reshape(x_BTCHW.shape), self.proj.weight, self.proj.bias)


class Attention(nn.Module):
    """Attention of each branch to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Attention_2d = BranchAttention(width)
        self.Attention_3d = BranchAttention(width)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> `B T C H W`."""
        key, motion = at_least_float32(x_BTCHW).chunk(2, dim=2)
        return torch.cat([key + self.Attention_2d(key), motion + self.Attention_3d(motion)], dim=2)


class Resample(nn.Module):
    """Base of downsampling and upsampling by 2 in space, and in time if there is a `time_conv`."""

    time_conv: nn.Conv3d | None

    def __init__(self, width_in: int, width_out: int, time_conv: nn.Conv3d | None) -> None:
        super().__init__()
        # Index 0 is the padding (down) or the doubling of pixels (up), without parameters.
        self.resample_2d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.resample_3d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.time_conv = time_conv


class Downsample(Resample):
    """Zeros at the right and bottom edge, stride 2; then each pair of frames after frame 0 becomes one."""

    def __init__(self, width: int, *, over_time: bool) -> None:
        super().__init__(width, width, nn.Conv3d(width, width, (2, 1, 1)) if over_time else None)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> `B T C H/2 W/2`, or with `(T+1)/2` frames. The 2-D branch keeps the first frame of each pair."""
        key, motion = x_BTCHW.chunk(2, dim=2)
        conv = self.time_conv
        if conv is not None:
            key = torch.cat([key[:, :1], key[:, 1::2]], dim=1)
        key, motion = _halved(key, self.resample_2d[1]), _halved(motion, self.resample_3d[1])
        if conv is not None and motion.shape[1] == 1:
            motion = with_zero_gradient(motion, conv)
        elif conv is not None:
            pairs = motion[:, 1:].unflatten(1, (-1, 2)).flatten(2, 3)  # channels of the first frame, then of the second
            joined = _per_frame(pairs, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias)
            motion = torch.cat([motion[:, :1], joined], dim=1)
        return torch.cat([key, motion], dim=2)


class Upsample(Resample):
    """Each frame after frame 0 becomes two; then each pixel becomes four, and a convolution."""

    def __init__(self, width: int, *, over_time: bool) -> None:
        super().__init__(width, width // 2, nn.Conv3d(width, 2 * width, 1) if over_time else None)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> `B T C/2 2H 2W`, or with `2T-1` frames."""
        key, motion = x_BTCHW.chunk(2, dim=2)
        conv = self.time_conv
        if conv is not None and x_BTCHW.shape[1] == 1:
            motion = with_zero_gradient(motion, conv)
        elif conv is not None:
            key = torch.cat([key[:, :1], key[:, 1:].repeat_interleave(2, dim=1)], dim=1)
            both = _per_frame(motion[:, 1:], conv.weight.squeeze(2), conv.bias).unflatten(2, (2, -1))
            motion = torch.cat([motion[:, :1], both.flatten(1, 2)], dim=1)
        return torch.cat([_doubled(key, self.resample_2d[1]), _doubled(motion, self.resample_3d[1])], dim=2)


class PyramidHead(nn.Module):
    """Six parallel convolutions of one input, and a 1x1 over their outputs (published as `PAC`)."""

    def __init__(self, channels: int, z: int) -> None:
        super().__init__()
        self.PAC_0 = FrameConv2d(channels, 2 * z, 1)
        for dilation in DILATIONS:
            self.add_module(f"PAC_{dilation}", FrameConv2d(channels, 2 * z, 3, dilation=dilation))
        self.PAC_conv = FrameConv2d(12 * z, 2 * z, 1)

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        """`B T C H W` -> `B T 2z H W`. The last convolution reads the first halves of all outputs before the second halves."""
        convs = [self.PAC_0, *(getattr(self, f"PAC_{dilation}") for dilation in DILATIONS)]
        outputs = [conv(x_BTCHW).unflatten(2, (2, -1)) for conv in convs]
        return cast("torch.Tensor", self.PAC_conv(torch.stack(outputs, dim=3).flatten(2, 4)))


def activated(x_BTCHW: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Norm and SiLU, run again in the backward pass: little work, much memory."""
    return recomputed(True, lambda x: F.silu(norm(x)), x_BTCHW)


def _per_frame(x_BTCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **geometry: Any) -> torch.Tensor:
    return F.conv2d(for_weights(x_BTCHW, weight).flatten(0, 1), weight, bias, **geometry).unflatten(
        0, x_BTCHW.shape[:2]
    )


def _halved(x_BTCHW: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    layer = cast("nn.Conv2d", conv)
    return _per_frame(F.pad(x_BTCHW, (0, 1, 0, 1)), layer.weight, layer.bias, stride=2)


def _doubled(x_BTCHW: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    layer = cast("nn.Conv2d", conv)
    larger = F.interpolate(x_BTCHW.flatten(0, 1), scale_factor=2.0).unflatten(0, x_BTCHW.shape[:2])
    return _per_frame(larger, layer.weight, layer.bias, padding=1)


def _bias(conv: nn.Module) -> torch.Tensor:
    return cast("torch.Tensor", conv.bias)

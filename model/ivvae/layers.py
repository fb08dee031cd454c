"""Layers of IV-VAE as published, under their published names (section 3 of the paper; group causal convolution: supplement 2.1).

Videos have channels last, `B T H W C`: convolutions of frames read them fastest in 16 bits, and norms and attention work along channels.
"Width c" means channels of a branch: features have 2c channels, those of the key-frame (2-D) branch first, then those of the motion (3-D)
branch. Only convolutions and attention ever compute in 16 bits; norms and the residual stream stay float32.

A step of a video (`model.history`) begins with frame 0 or with a group of frames; a whole video is one step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.history import WHOLE, History
from model.layers import activated, at_least_float32, own_autocast, with_zero_gradient

DILATIONS = (1, 3, 6, 9, 12)  # of the 3x3 convolutions in the encoder's head, which follow a 1x1


class NormGain(nn.Module):
    """RMS norm (no additive epsilon) of the channels of each half at a position, times gamma, which has `axes` trailing axes of one."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))

    def forward(self, x_BTHWC: torch.Tensor, *, halves: int = 2) -> torch.Tensor:
        """In at least float32; with `halves=1` one norm over all channels."""
        parts = at_least_float32(x_BTHWC).unflatten(-1, (halves, -1))
        gain = at_least_float32(self.gamma).view(halves, -1) * parts.shape[-1] ** 0.5
        return (F.normalize(parts, dim=-1) * gain).flatten(-2)


class ConvPair(nn.Module):
    """2-D and 3-D convolution of all channels, 3x3(x3) or 1x1(x1): KTC unit (section 3) with GCConv (supplement 2.1), as `Sep_Conv3d`.

    A frame's 3-D output reads the frame before (frame 0 reads itself instead), itself, and the next frame of its group; `group` frames
    to a group after frame 0. `full_precision`: products stay in at least float32.
    """

    def __init__(
        self, channels_in: int, width_out: int, size: int, group: int = 1, *, full_precision: bool = False
    ) -> None:
        super().__init__()
        self.group, self.full_precision = group, full_precision
        self.conv_2d = nn.Conv2d(channels_in, width_out, size)
        self.conv_3d = nn.Conv3d(channels_in, width_out, size)

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> 2-D outputs, then 3-D ones, `B T H W 2*width`.

        One convolution of each frame gives the 2-D output and the product of each tap of the 3-D kernel; products are summed over frames.
        """
        flat, deep = cast("Any", self.conv_2d), cast("Any", self.conv_3d)
        weight, zeros = torch.cat([flat.weight, *deep.weight.unbind(2)]), torch.zeros_like(deep.bias)
        with own_autocast(self, x_BTHWC):
            if flat.kernel_size[0] == 1:
                return _per_frame(x_BTHWC, weight, torch.cat([flat.bias, deep.bias]))
            y = _per_frame(x_BTHWC, weight, torch.cat([flat.bias, zeros, deep.bias, zeros]), padding=1)
        key, to_next, present, to_previous = y.split([flat.out_channels, *[deep.out_channels] * 3], dim=-1)
        motion = present + history.extend(to_next, 1, axis=1, start="first")[:, :-1]
        begins = begins_group(y.shape[1], self.group, history, y.device)
        motion[:, :-1] += to_previous[:, 1:].masked_fill(begins[1:], 0.0)
        return torch.cat([key, motion], dim=-1)


def begins_group(frames: int, group: int, history: History, device: torch.device) -> torch.Tensor:
    """Which of a step's frames are frame 0 or begin a group of `group` frames (supplement 2.1), as a mask `T 1 1 1`."""
    order = torch.arange(frames, device=device)
    begins = (order == 0) | (order % group == 1 % group) if history.first else order % group == 0
    return begins[:, None, None, None]


class FrameConv2d(nn.Module):
    """Convolution of each frame over both branches, zero padding (published as `Sep_Conv2d`). `full_precision`: as of `ConvPair`."""

    def __init__(
        self, channels_in: int, channels_out: int, size: int, *, dilation: int = 1, full_precision: bool = False
    ) -> None:
        super().__init__()
        self.full_precision = full_precision
        self.conv = nn.Conv2d(channels_in, channels_out, size, padding=dilation * (size // 2), dilation=dilation)

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> as many frames of the same size."""
        conv = self.conv
        with own_autocast(self, x_BTHWC):
            return _per_frame(x_BTHWC, conv.weight, conv.bias, padding=conv.padding[0], dilation=conv.dilation[0])


class _Residual(nn.Module):
    """Norm, SiLU, convolution, norm, SiLU, (dropout), convolution, added to the input or a shortcut of it."""

    def __init__(self, channels_in: int, channels_out: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        none = nn.Identity()  # SiLU and dropout have no parameters
        norms = NormGain(channels_in, 3), NormGain(channels_out, 3)
        self.residual = nn.Sequential(norms[0], none, first, norms[1], none, none, second)
        self.shortcut: nn.Module | None = None

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> `B T H W C'`."""
        layers = self.residual
        h = layers[2](activated(x_BTHWC, layers[0]), history)
        h = layers[6](activated(h, layers[3]), history)
        return at_least_float32(x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC)) + h


class Residual3d(_Residual):
    """Residual block of pairs of convolutions, of frames in groups of `group`; a 1x1 shortcut if the width changes."""

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

    def forward(self, x_BTHWC: torch.Tensor) -> torch.Tensor:
        """`B T H W C` of one branch -> the same shape, without the residual sum."""
        normed = self.norm(x_BTHWC, halves=1)
        q, k, v = _per_frame(normed, self.to_qkv.weight, self.to_qkv.bias).flatten(2, 3).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return _per_frame(mixed.view(x_BTHWC.shape), self.proj.weight, self.proj.bias)


class Attention(nn.Module):
    """Attention of each branch to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Attention_2d = BranchAttention(width)
        self.Attention_3d = BranchAttention(width)

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> `B T H W C`."""
        key, motion = at_least_float32(x_BTHWC).chunk(2, dim=-1)
        return torch.cat([key + self.Attention_2d(key), motion + self.Attention_3d(motion)], dim=-1)


class Resample(nn.Module):
    """Base of downsampling and upsampling by 2 in space, and in time if there is a `time_conv`; frame 0 stays one frame."""

    time_conv: nn.Conv3d | None

    def __init__(self, width_in: int, width_out: int, time_conv: nn.Conv3d | None) -> None:
        super().__init__()
        # Index 0 is the padding (down) or the doubling of pixels (up), without parameters.
        self.resample_2d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.resample_3d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.time_conv = time_conv


class Downsample(Resample):
    """Zeros at the right and bottom edge, stride 2; then each pair of frames after frame 0 becomes one (W_down of supplement 2.2)."""

    def __init__(self, width: int, *, over_time: bool) -> None:
        super().__init__(width, width, nn.Conv3d(width, width, (2, 1, 1)) if over_time else None)

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> `B T H/2 W/2 C`, or with half the frames after frame 0. The 2-D branch keeps the first frame of each pair."""
        key, motion = x_BTHWC.chunk(2, dim=-1)
        conv, lead = self.time_conv, int(history.first)
        if conv is not None:
            key = torch.cat([key[:, :lead], key[:, lead::2]], dim=1)
        key, motion = _halved(key, self.resample_2d[1]), _halved(motion, self.resample_3d[1])
        if conv is not None and motion.shape[1] == lead:
            motion = with_zero_gradient(motion, conv)
        elif conv is not None:
            # channels of the first frame, then of the second
            pairs = motion[:, lead:].unflatten(1, (-1, 2)).movedim(2, -2).flatten(-2)
            joined = _per_frame(pairs, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias)
            motion = torch.cat([motion[:, :lead], joined], dim=1)
        return torch.cat([key, motion], dim=-1)


class Upsample(Resample):
    """Each frame after frame 0 becomes two (W_up of supplement 2.2); then each pixel becomes four, and a convolution."""

    def __init__(self, width: int, *, over_time: bool) -> None:
        super().__init__(width, width // 2, nn.Conv3d(width, 2 * width, 1) if over_time else None)

    def forward(self, x_BTHWC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B T H W C` -> `B T 2H 2W C/2`, or with twice the frames after frame 0."""
        key, motion = x_BTHWC.chunk(2, dim=-1)
        conv, lead = self.time_conv, int(history.first)
        if conv is not None and x_BTHWC.shape[1] == lead:
            motion = with_zero_gradient(motion, conv)
        elif conv is not None:
            key = torch.cat([key[:, :lead], key[:, lead:].repeat_interleave(2, dim=1)], dim=1)
            both = _per_frame(motion[:, lead:], conv.weight.squeeze(2), conv.bias).unflatten(-1, (2, -1))
            motion = torch.cat([motion[:, :lead], both.movedim(-2, 2).flatten(1, 2)], dim=1)
        return torch.cat([_doubled(key, self.resample_2d[1]), _doubled(motion, self.resample_3d[1])], dim=-1)


class PyramidHead(nn.Module):
    """Six parallel convolutions of one input, and a 1x1 over their outputs (published as `PAC`)."""

    def __init__(self, channels: int, z: int) -> None:
        super().__init__()
        self.PAC_0 = FrameConv2d(channels, 2 * z, 1, full_precision=True)
        for dilation in DILATIONS:
            layer = FrameConv2d(channels, 2 * z, 3, dilation=dilation, full_precision=True)
            self.add_module(f"PAC_{dilation}", layer)
        self.PAC_conv = FrameConv2d(12 * z, 2 * z, 1, full_precision=True)

    def forward(self, x_BTHWC: torch.Tensor) -> torch.Tensor:
        """`B T H W C` -> `B T H W 2z`. The last convolution reads the first halves of all outputs before the second halves."""
        convs = [self.PAC_0, *(getattr(self, f"PAC_{dilation}") for dilation in DILATIONS)]
        outputs = [conv(x_BTHWC).unflatten(-1, (2, -1)) for conv in convs]
        return cast("torch.Tensor", self.PAC_conv(torch.stack(outputs, dim=-2).flatten(-3)))


def _per_frame(x_BTHWC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **geometry: Any) -> torch.Tensor:
    """2-D convolution of every frame, in the dtype of the weights."""
    frames = x_BTHWC.to(weight.dtype).flatten(0, 1).permute(0, 3, 1, 2)
    return F.conv2d(frames, weight, bias, **geometry).permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


def _halved(x_BTHWC: torch.Tensor, conv: Any) -> torch.Tensor:
    return _per_frame(F.pad(x_BTHWC, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, stride=2)


def _doubled(x_BTHWC: torch.Tensor, conv: Any) -> torch.Tensor:
    larger = x_BTHWC.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return _per_frame(larger, conv.weight, conv.bias, padding=1)

"""Layers of WF-VAE with weights prepared for speed, on channel-last frames `B T H W C`; each processes the frames of one step.

Takes frames and the `StreamState` of the step; returns frames in at least float32. Norms, residual sums and activations are in at least
float32; only convolutions and attention run in the network's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from model.convolution import ClipConv, FrameConv, as_frames, from_frames
from model.wfvae.layers import LayerNorm

if TYPE_CHECKING:
    from model.wfvae.fast.stream_state import StreamState


class LayerBuilder:
    """Device and dtypes that layers are built with, and the numbering of their state slots.

    Attributes:
        frames_per_step: frames that a usual step brings to the next layer built; layers are built in the order of the stream.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, frames_per_step: int) -> None:
        self.device, self.dtype, self.full_dtype = device, dtype, torch.promote_types(dtype, torch.float32)
        self.slots, self.frames_per_step = 0, frames_per_step

    def new_slot(self) -> int:
        """Number of the next free state slot."""
        self.slots += 1
        return self.slots - 1

    def frame_conv(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        full_precision: bool = False,
        stride: int = 1,
        padding: int = 0,
    ) -> FrameConv:
        """Convolution of single frames, computed in the network's dtype or in at least float32."""
        dtype = self.full_dtype if full_precision else self.dtype
        return FrameConv(weight, bias, self.device, dtype, stride=stride, padding=padding)

    def clip_conv(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        full_precision: bool = False,
        stride: int = 1,
        padding: int = 1,
    ) -> ClipConv:
        """CausalConv convolution, computed in the network's dtype or in at least float32."""
        dtype = self.full_dtype if full_precision else self.dtype
        return ClipConv(
            weight, bias, self.device, dtype, stride=stride, padding=padding, usual_frames=self.frames_per_step
        )


class Norm:
    """LayerNorm over channels, or GroupNorm over groups of channels, space and (unless `per_frame`) time."""

    def __init__(self, builder: LayerBuilder, published: Any, *, per_frame: bool = False) -> None:
        norm = published.norm if isinstance(published, LayerNorm) else published
        self.weight = norm.weight.detach().to(builder.device, builder.full_dtype)
        self.bias = norm.bias.detach().to(builder.device, builder.full_dtype)
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        self.eps, self.per_frame = norm.eps, per_frame

    def __call__(self, x_BTHWC: torch.Tensor) -> torch.Tensor:
        """Normalised frames in fresh memory."""
        if not self.groups:
            return F.layer_norm(x_BTHWC, self.weight.shape, self.weight, self.bias, self.eps)
        x_NCTHW = (x_BTHWC.flatten(0, 1).unsqueeze(1) if self.per_frame else x_BTHWC).permute(0, 4, 1, 2, 3)
        y = F.group_norm(x_NCTHW.contiguous(), self.groups, self.weight, self.bias, self.eps)
        return y.permute(0, 2, 3, 4, 1).reshape(x_BTHWC.shape)

    def activated(self, x_BTHWC: torch.Tensor) -> torch.Tensor:
        """Normalises, then applies SiLU."""
        return F.silu(self(x_BTHWC), inplace=True)


class FrameBlock:
    """Convolution of single frames, with the interface of the other layers."""

    def __init__(
        self, builder: LayerBuilder, published: Any, *, full_precision: bool = False, weight: torch.Tensor | None = None
    ) -> None:
        kernel = published.weight if weight is None else weight
        self.conv = builder.frame_conv(
            kernel, published.bias, full_precision=full_precision, padding=kernel.shape[-1] // 2
        )

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        return from_frames(self.conv(as_frames(x_BTHWC)), x_BTHWC.shape[1])


class CausalConv:
    """CausalConv 3x3x3 convolution; its state is two frames."""

    def __init__(self, builder: LayerBuilder, published: Any, *, full_precision: bool = False) -> None:
        self.slot, self.conv = (
            builder.new_slot(),
            builder.clip_conv(published.conv.weight, published.conv.bias, full_precision=full_precision),
        )

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        x_BTHWC = x_BTHWC.to(self.conv.dtype)
        return self.conv(x_BTHWC, stream.past_frames(self.slot, x_BTHWC, 2))


class Residual:
    """Residual block: twice norm, SiLU and convolution, plus the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, builder: LayerBuilder, published: Any) -> None:
        causal = not isinstance(published.conv1, nn.Conv2d)
        conv = CausalConv if causal else FrameBlock
        self.norm1 = Norm(builder, published.norm1, per_frame=not causal)
        self.norm2 = Norm(builder, published.norm2, per_frame=not causal)
        self.conv1, self.conv2 = conv(builder, published.conv1), conv(builder, published.conv2)
        self.shortcut: FrameConv | None = None
        if published.nin_shortcut is not None:
            short = published.nin_shortcut.conv if causal else published.nin_shortcut
            self.shortcut = builder.frame_conv(short.weight.flatten(2)[..., None], short.bias)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        y = self.conv1(self.norm1.activated(x_BTHWC), stream)
        y = self.conv2(self.norm2.activated(y), stream)
        return y.add_(x_BTHWC if self.shortcut is None else from_frames(self.shortcut(as_frames(x_BTHWC)), y.shape[1]))


class Attention:
    """Single-head attention over all positions of each frame, plus the input.

    `mixes_frames` selects the older published block, which reads memory laid out `C T H W` as `T C H W`, so that positions, channels and
    frames are mixed up. Networks trained with it need it, and accept whole clips only.
    """

    def __init__(self, builder: LayerBuilder, published: Any, *, mixes_frames: bool) -> None:
        q, k, v, out = (getattr(published, name).conv for name in ("q", "k", "v", "proj_out"))
        self.norm, self.mixes_frames, self.dtype = Norm(builder, published.norm), mixes_frames, builder.dtype
        stacked = torch.cat([conv.weight.flatten(1) for conv in (q, k, v)])[..., None, None]
        self.qkv = builder.frame_conv(stacked, torch.cat([conv.bias for conv in (q, k, v)]))
        self.out = builder.frame_conv(out.weight.flatten(1)[..., None, None], out.bias)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> the same shape."""
        B, T, H, W, C = x_BTHWC.shape
        qkv_NHWC = self.qkv(as_frames(self.norm(x_BTHWC))).permute(0, 2, 3, 1).to(self.dtype)
        if self.mixes_frames:
            as_published = qkv_NHWC.reshape(B, T, H * W, 3, C).permute(3, 0, 4, 1, 2)
            q, k, v = as_published.reshape(3, B * T, 1, C, H * W).transpose(-1, -2)
        else:
            q, k, v = qkv_NHWC.reshape(B * T, 1, H * W, 3 * C).split(C, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.mixes_frames:
            y = y.transpose(-1, -2).reshape(B, C, T, H, W).permute(0, 2, 3, 4, 1)
        y_NCHW = self.out(as_frames(y.reshape(B, T, H, W, C)))
        return from_frames(y_NCHW, T).add_(x_BTHWC)


class Downsample:
    """Downsampling by 2: zero padding right and below, 3x3 with stride 2; the causal form also halves the frames (state: one frame)."""

    def __init__(self, builder: LayerBuilder, published: Any) -> None:
        self.causal = not isinstance(published.conv, nn.Conv2d)
        if self.causal:
            conv = published.conv.conv
            self.slot, self.clip = builder.new_slot(), builder.clip_conv(conv.weight, conv.bias, stride=2, padding=0)
            builder.frames_per_step //= 2
        else:
            self.frame = builder.frame_conv(published.conv.weight, published.conv.bias, stride=2)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> `B T' H/2 W/2 C`."""
        dtype = self.clip.dtype if self.causal else self.frame.dtype
        padded = F.pad(x_BTHWC.to(dtype), (0, 0, 0, 1, 0, 1))
        if self.causal:
            return self.clip(padded, stream.past_frames(self.slot, padded, 1))
        return from_frames(self.frame(as_frames(padded)), x_BTHWC.shape[1])


class Upsample:
    """Upsampling of frames by 2: nearest and 3x3 convolution, computed as four 2x2 convolutions of the small frame, one per pixel phase."""

    def __init__(self, builder: LayerBuilder, published: Any) -> None:
        weight = published.conv.weight.detach().double()
        self.channels = weight.shape[0]
        for axis in (-2, -1):
            a, b, c = weight.unbind(axis)
            weight = torch.stack([torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)])
        phases_OIhw = weight.flatten(0, 2)  # (column phase, row phase, O), I, 2, 2
        self.conv = builder.frame_conv(phases_OIhw, published.conv.bias.repeat(4), padding=1)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> `B T 2H 2W C`."""
        B, T, H, W, _ = x_BTHWC.shape
        y = self.conv(as_frames(x_BTHWC)).permute(0, 2, 3, 1).unflatten(-1, (2, 2, self.channels))
        out = y.new_empty((B * T, H, 2, W, 2, self.channels))
        for row in (0, 1):
            for column in (0, 1):
                out[:, :, row, :, column] = y[:, row : row + H, column : column + W, column, row]
        return out.view(B, T, 2 * H, 2 * W, self.channels)


class UpsampleClip:
    """Upsampling by 2 in space and time, then a causal convolution.

    Frame 0 of the video stays one frame. Each other frame becomes two: copies of itself (nearest), or weighted means of a quarter of a
    neighbour and three quarters of itself, where the last frame is its own neighbour. So each step holds one frame back until the next one.
    """

    def __init__(self, builder: LayerBuilder, published: Any, *, nearest: bool) -> None:
        builder.frames_per_step *= 2
        self.nearest, self.slot, self.conv = nearest, builder.new_slot(), CausalConv(builder, published.conv)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` -> `B T' 2H 2W C`."""
        x = self.double_frames(x_BTHWC, stream)
        frames = F.interpolate(as_frames(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv(from_frames(frames, x.shape[1]), stream)

    def double_frames(self, x_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """Doubles the frames in time."""
        first, body = (x_BTHWC[:, :1], x_BTHWC[:, 1:]) if stream.first else (x_BTHWC[:, :0], x_BTHWC)
        if self.nearest:
            stream.save(self.slot, x_BTHWC.new_empty((x_BTHWC.shape[0], 0)))
            return torch.cat([first, body.repeat_interleave(2, dim=1)], dim=1)
        held = stream.previous(self.slot)
        line = body if held is None else torch.cat([held, body], dim=1)
        between = torch.stack(
            [0.75 * line[:, :-1] + 0.25 * line[:, 1:], 0.25 * line[:, :-1] + 0.75 * line[:, 1:]], dim=2
        )
        # the first frame of the body is its own neighbour
        edge = body[:, :1] if held is None or not held.shape[1] else body[:, :0]
        ending = line[:, -1:] if stream.last else line[:, :0]
        stream.save(self.slot, line[:, -1:].clone())
        return torch.cat([first, edge, between.flatten(1, 2), ending], dim=1)

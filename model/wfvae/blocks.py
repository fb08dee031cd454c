"""The blocks of WF-VAE prepared for running on channel-last frames `B T H W C`, in streams: each takes what a step brings.

Enters: a block's published parameters, then frames and the `Memory` of the step. Leaves: frames in at least float32.
Norms, residual sums and activations are in at least float32; only convolutions and attention run in the network's arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from model.convolution import ClipConv, FrameConv, as_frames, frames_of
from model.wfvae.parameters import LayerNorm

if TYPE_CHECKING:
    from model.wfvae.memory import Memory


class Bench:
    """Where and in which arithmetic blocks are prepared, and the numbering of the slots they remember in.

    Attributes:
        pace: frames that a steady step brings to the block prepared next; blocks are prepared in the order of the stream.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, pace: int) -> None:
        self.device, self.dtype, self.wide = device, dtype, torch.promote_types(dtype, torch.float32)
        self.slots, self.pace = 0, pace

    def slot(self) -> int:
        """The next free slot."""
        self.slots += 1
        return self.slots - 1

    def frame_conv(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, wide: bool = False, stride: int = 1, padding: int = 0
    ) -> FrameConv:
        """A convolution of frames in the network's arithmetic, or in at least float32."""
        dtype = self.wide if wide else self.dtype
        return FrameConv(weight, bias, self.device, dtype, stride=stride, padding=padding)

    def clip_conv(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, wide: bool = False, stride: int = 1, padding: int = 1
    ) -> ClipConv:
        """A causal convolution in the network's arithmetic, or in at least float32."""
        dtype = self.wide if wide else self.dtype
        return ClipConv(weight, bias, self.device, dtype, stride=stride, padding=padding, steady=self.pace)


class Norm:
    """LayerNorm over channels, or GroupNorm over groups of channels, space and (but for `per_frame`) time."""

    def __init__(self, bench: Bench, published: Any, *, per_frame: bool = False) -> None:
        norm = published.norm if isinstance(published, LayerNorm) else published
        self.weight = norm.weight.detach().to(bench.device, bench.wide)
        self.bias = norm.bias.detach().to(bench.device, bench.wide)
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
        """Normalised, then SiLU."""
        return F.silu(self(x_BTHWC), inplace=True)


class Frames:
    """A convolution of single frames, in the shape the blocks use."""

    def __init__(self, bench: Bench, published: Any, *, wide: bool = False, weight: torch.Tensor | None = None) -> None:
        kernel = published.weight if weight is None else weight
        self.conv = bench.frame_conv(kernel, published.bias, wide=wide, padding=kernel.shape[-1] // 2)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory | None = None) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        return frames_of(self.conv(as_frames(x_BTHWC)), x_BTHWC.shape[1])


class Causal:
    """A causal 3x3x3 convolution; remembers two frames."""

    def __init__(self, bench: Bench, published: Any, *, wide: bool = False) -> None:
        self.slot, self.conv = bench.slot(), bench.clip_conv(published.conv.weight, published.conv.bias, wide=wide)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        x_BTHWC = x_BTHWC.to(self.conv.dtype)
        return self.conv(x_BTHWC, memory.history(self.slot, x_BTHWC, 2))


class Residual:
    """Norm, SiLU, convolution, twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, bench: Bench, published: Any) -> None:
        causal = not isinstance(published.conv1, nn.Conv2d)
        conv = Causal if causal else Frames
        self.norm1 = Norm(bench, published.norm1, per_frame=not causal)
        self.norm2 = Norm(bench, published.norm2, per_frame=not causal)
        self.conv1, self.conv2 = conv(bench, published.conv1), conv(bench, published.conv2)
        self.shortcut: FrameConv | None = None
        if hasattr(published, "nin_shortcut"):
            short = published.nin_shortcut.conv if causal else published.nin_shortcut
            self.shortcut = bench.frame_conv(short.weight.flatten(2)[..., None], short.bias)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> `B T H W O`."""
        y = self.conv1(self.norm1.activated(x_BTHWC), memory)
        y = self.conv2(self.norm2.activated(y), memory)
        return y.add_(x_BTHWC if self.shortcut is None else frames_of(self.shortcut(as_frames(x_BTHWC)), y.shape[1]))


class Attention:
    """Full attention with one head among the positions of each frame, plus the input.

    `mixing` is the older published block: it reads memory laid out `C T H W` as if it were `T C H W`, so that positions, channels and
    frames change places. Networks trained with it need it, and whole clips.
    """

    def __init__(self, bench: Bench, published: Any, *, mixing: bool) -> None:
        q, k, v, out = (getattr(published, name).conv for name in ("q", "k", "v", "proj_out"))
        self.norm, self.mixing, self.dtype = Norm(bench, published.norm), mixing, bench.dtype
        stacked = torch.cat([conv.weight.flatten(1) for conv in (q, k, v)])[..., None, None]
        self.qkv = bench.frame_conv(stacked, torch.cat([conv.bias for conv in (q, k, v)]))
        self.out = bench.frame_conv(out.weight.flatten(1)[..., None, None], out.bias)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> the same shape."""
        B, T, H, W, C = x_BTHWC.shape
        qkv_NHWC = self.qkv(as_frames(self.norm(x_BTHWC))).permute(0, 2, 3, 1).to(self.dtype)
        if self.mixing:
            as_published = qkv_NHWC.reshape(B, T, H * W, 3, C).permute(3, 0, 4, 1, 2)
            q, k, v = as_published.reshape(3, B * T, 1, C, H * W).transpose(-1, -2)
        else:
            q, k, v = qkv_NHWC.reshape(B * T, 1, H * W, 3 * C).split(C, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.mixing:
            y = y.transpose(-1, -2).reshape(B, C, T, H, W).permute(0, 2, 3, 4, 1)
        y_NCHW = self.out(as_frames(y.reshape(B, T, H, W, C)))
        return frames_of(y_NCHW, T).add_(x_BTHWC)


class Shrink:
    """Half the size: zeros to the right and below, 3x3 with stride 2; over frames also half the frames, remembering one."""

    def __init__(self, bench: Bench, published: Any) -> None:
        self.causal = not isinstance(published.conv, nn.Conv2d)
        if self.causal:
            conv = published.conv.conv
            self.slot, self.clip = bench.slot(), bench.clip_conv(conv.weight, conv.bias, stride=2, padding=0)
            bench.pace //= 2
        else:
            self.frame = bench.frame_conv(published.conv.weight, published.conv.bias, stride=2)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> `B T' H/2 W/2 C`."""
        dtype = self.clip.dtype if self.causal else self.frame.dtype
        padded = F.pad(x_BTHWC.to(dtype), (0, 0, 0, 1, 0, 1))
        if self.causal:
            return self.clip(padded, memory.history(self.slot, padded, 1))
        return frames_of(self.frame(as_frames(padded)), x_BTHWC.shape[1])


class Grow:
    """Twice the size: nearest and a 3x3 convolution, which is four 2x2 convolutions of the small frame, one per phase of a pixel."""

    def __init__(self, bench: Bench, published: Any) -> None:
        weight = published.conv.weight.detach().double()
        self.channels = weight.shape[0]
        for axis in (-2, -1):
            a, b, c = weight.unbind(axis)
            weight = torch.stack([torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)])
        phases_OIhw = weight.flatten(0, 2)  # (column phase, row phase, O), I, 2, 2
        self.conv = bench.frame_conv(phases_OIhw, published.conv.bias.repeat(4), padding=1)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> `B T 2H 2W C`."""
        B, T, H, W, _ = x_BTHWC.shape
        y = self.conv(as_frames(x_BTHWC)).permute(0, 2, 3, 1).unflatten(-1, (2, 2, self.channels))
        out = y.new_empty((B * T, H, 2, W, 2, self.channels))
        for row in (0, 1):
            for column in (0, 1):
                out[:, :, row, :, column] = y[:, row : row + H, column : column + W, column, row]
        return out.view(B, T, 2 * H, 2 * W, self.channels)


class GrowClip:
    """Twice the size and nearly twice the frames, then a causal convolution.

    Frame 0 of the video stays one frame. The others become two each: the same twice (nearest), or a quarter of the neighbour and three
    quarters of itself, where the last frame is its own neighbour. So each step holds one frame back until it knows the next one.
    """

    def __init__(self, bench: Bench, published: Any, *, nearest: bool) -> None:
        bench.pace *= 2
        self.nearest, self.slot, self.conv = nearest, bench.slot(), Causal(bench, published.conv)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` -> `B T' 2H 2W C`."""
        x = self.in_time(x_BTHWC, memory)
        frames = F.interpolate(as_frames(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv(frames_of(frames, x.shape[1]), memory)

    def in_time(self, x_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Frames doubled in time."""
        alone, body = (x_BTHWC[:, :1], x_BTHWC[:, 1:]) if memory.first else (x_BTHWC[:, :0], x_BTHWC)
        if self.nearest:
            memory.keep(self.slot, x_BTHWC.new_empty((x_BTHWC.shape[0], 0)))
            return torch.cat([alone, body.repeat_interleave(2, dim=1)], dim=1)
        held = memory.take(self.slot)
        line = body if held is None else torch.cat([held, body], dim=1)
        between = torch.stack(
            [0.75 * line[:, :-1] + 0.25 * line[:, 1:], 0.25 * line[:, :-1] + 0.75 * line[:, 1:]], dim=2
        )
        edge = (
            body[:, :1] if held is None or not held.shape[1] else body[:, :0]
        )  # the first of the body is its own neighbour
        ending = line[:, -1:] if memory.last else line[:, :0]
        memory.keep(self.slot, line[:, -1:].clone())
        return torch.cat([alone, edge, between.flatten(1, 2), ending], dim=1)

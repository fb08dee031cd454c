"""The pair of convolutions IV-VAE is made of, as 2-D convolutions of frames: nothing is padded in time, no zero frame is multiplied.

Enters: the published pair (3x3 and group-causal 3x3x3, both over all channels) and windows of bordered frames, the previous one first.
Leaves: both outputs side by side. Source: spec sections 2 (rule) and 8 (what may be folded).

Inside a group `out_j = W0 x_{j-1} + W1 x_j + W2 x_{j+1}`, without the last term for the group's last frame; for the clip's first frame
`out = (W0 + W1) x`. Two ways to compute it:

- *shifted frames*: the 2-D kernel stacked on W1, then W0 and W2 of the frames before and behind;
- *minimal filtering* (Winograd's F(2,3) along time) for two frames at once: four products instead of six. With `s = x_j + x_{j+1}` and
  `d = x_{j+1} - x_j`: `out_j = W0 (x_{j-1} - x_{j+1}) + P s + M d` and `out_{j+1} = P s - M d - W2 (x_j - x_{j+2})`, where
  `P = (W0 + W1 + W2) / 2`, `M = (W0 - W1 + W2) / 2`. The 2-D kernel rides along: `K x_j = K/2 s - K/2 d`, `K x_{j+1} = K/2 s + K/2 d`.
  A fifth fewer multiplications in groups of four, a seventh in groups of two, and as close to float64 as the other way. For float32
  and float64, where products are what costs; sums of frames rounded to 16 bits would lose a bit.

In float32 on a CPU wide kernels are transformed in space, too (`model.convolution` decides).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.convolution import FrameConv

if TYPE_CHECKING:
    from model.ivvae.parameters import ConvPair


def filters_minimally(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products cost more here than the sums that save them, in an arithmetic that bears the sums."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


class PairConv:
    """One published pair, prepared. Frames are bordered with a row of zeros above and below; columns are padded here."""

    def __init__(self, pair: ConvPair, group: int, device: torch.device, dtype: torch.dtype) -> None:
        flat, (before, here, behind) = pair.conv_2d.weight.double(), pair.conv_3d.weight.double().unbind(2)
        bias = _biases(pair)

        def conv(*kernels: torch.Tensor, bias: torch.Tensor | None = None) -> FrameConv:
            return FrameConv(torch.cat(kernels), bias, device, dtype, padding=(0, 1))

        self.group, self.width = group, int(flat.shape[0])
        self.lead = conv(flat, before + here, bias=bias)
        self.before, self.behind = conv(before), conv(behind)
        self.minimal = filters_minimally(device, dtype)
        if self.minimal:
            self.sum = conv(flat / 2, (before + here + behind) / 2, bias=bias)
            self.difference = conv(flat / 2, (before - here + behind) / 2)
        else:
            self.here = conv(flat, here, bias=bias)

    def first_frame(self, frame_BHWC: torch.Tensor) -> torch.Tensor:
        """`(B, R+2, W, C)` -> `(1, B, R, W, 2c)`: the first frame of a clip."""
        return _frames(self.lead, frame_BHWC[None])

    def __call__(self, window_TBHWC: torch.Tensor) -> torch.Tensor:
        """`(1 + group * n, B, R+2, W, C)`, the first one the frame before -> `(group * n, B, R, W, 2c)`, at least float32."""
        if self.minimal:
            pairs = [self._two(window_TBHWC, j) for j in range(0, window_TBHWC.shape[0] - 1, 2)]
            return pairs[0] if len(pairs) == 1 else torch.cat(pairs)
        window_TBHWC = window_TBHWC.contiguous()
        groups = (-1, self.group)
        y = _frames(self.here, window_TBHWC[1:])
        motion = y[..., self.width :]
        motion += _frames(self.before, window_TBHWC[:-1])
        behind = window_TBHWC[1:].unflatten(0, groups)[:, 1:]
        motion.unflatten(0, groups)[:, :-1] += _frames(self.behind, behind.flatten(0, 1)).unflatten(0, behind.shape[:2])
        return y

    def _two(self, window_TBHWC: torch.Tensor, j: int) -> torch.Tensor:
        """Outputs of frames j and j+1 (of the window without its first)."""
        x0, x1, x2 = (window_TBHWC[j + k : j + k + 1] for k in range(3))
        last = (j + 2) % self.group == 0
        x3 = x1 if last else x1 - window_TBHWC[j + 3 : j + 4]
        plus, minus = _frames(self.sum, x1 + x2), _frames(self.difference, x2 - x1)
        c = self.width
        y = plus.new_empty((2, *plus.shape[1:]))
        torch.sub(plus[..., :c], minus[..., :c], out=y[:1, ..., :c])
        torch.add(plus[..., :c], minus[..., :c], out=y[1:, ..., :c])
        torch.add(plus[..., c:], minus[..., c:], out=y[:1, ..., c:])
        torch.sub(plus[..., c:], minus[..., c:], out=y[1:, ..., c:])
        y[:1, ..., c:] += _frames(self.before, x0 - x2)
        y[1:, ..., c:] -= _frames(self.behind, x3)
        return y


class PointPair:
    """A pair of 1x1 convolutions as one."""

    def __init__(self, pair: ConvPair, device: torch.device, dtype: torch.dtype) -> None:
        kernel = torch.cat([pair.conv_2d.weight.double(), pair.conv_3d.weight.double()[:, :, 0]])
        self.conv = FrameConv(kernel, _biases(pair), device, dtype)

    def __call__(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        """`(T, B, R, W, C)` -> `(T, B, R, W, 2c)`, at least float32."""
        return _frames(self.conv, x_TBHWC)


def _biases(pair: ConvPair) -> torch.Tensor:
    if pair.conv_2d.bias is None or pair.conv_3d.bias is None:
        raise ValueError("a convolution pair has biases in both halves; got one without")
    return torch.cat([pair.conv_2d.bias, pair.conv_3d.bias]).double()


def _frames(conv: FrameConv, x_TBHWC: torch.Tensor) -> torch.Tensor:
    """A convolution over every frame of `(T, B, H, W, C)`."""
    y = conv(x_TBHWC.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.unflatten(0, x_TBHWC.shape[:2])

"""IV-VAE's pair of convolutions (3x3 and group-causal 3x3x3, both over all channels), as 2-D convolutions of frames (spec sections 2, 8).

Takes windows of bordered frames, the previous frame first; returns both outputs, concatenated. Nothing is padded in time.

Inside a group `out_j = W0 x_{j-1} + W1 x_j + W2 x_{j+1}`, without the last term for the group's last frame; for the clip's first frame
`out = (W0 + W1) x`. Two ways to compute it:

- *shifted frames*: the 2-D kernel stacked on W1, then W0 and W2 of the previous and next frames;
- *minimal filtering* (Winograd's F(2,3) along time) for two frames at once: four products instead of six. With `s = x_j + x_{j+1}` and
  `d = x_{j+1} - x_j`: `out_j = W0 (x_{j-1} - x_{j+1}) + P s + M d` and `out_{j+1} = P s - M d - W2 (x_j - x_{j+2})`, where
  `P = (W0 + W1 + W2) / 2`, `M = (W0 - W1 + W2) / 2`. The same products serve the 2-D kernel: `K x_j = K/2 s - K/2 d`,
  `K x_{j+1} = K/2 s + K/2 d`. A fifth fewer multiplications in groups of four, a seventh in groups of two, and as close to float64 as the
  other way. Used for float32 and float64 on a CPU, where products dominate; sums of frames rounded to 16 bits would lose a bit.

In float32 on a CPU, kernels with many channels are also transformed in space (`model.convolution` decides).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.convolution import FrameConv

if TYPE_CHECKING:
    from model.ivvae.layers import ConvPair


def filters_minimally(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether minimal filtering pays off: products dominate, and the dtype is precise enough for sums of frames."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


class PairConv:
    """One prepared pair. Frames are bordered with a row of zeros above and below; columns are padded present."""

    def __init__(self, pair: ConvPair, group: int, device: torch.device, dtype: torch.dtype) -> None:
        spatial, (previous, present, following) = pair.conv_2d.weight.double(), pair.conv_3d.weight.double().unbind(2)
        bias = _biases(pair)

        def conv(*kernels: torch.Tensor, bias: torch.Tensor | None = None) -> FrameConv:
            return FrameConv(torch.cat(kernels), bias, device, dtype, padding=(0, 1))

        self.group, self.width = group, int(spatial.shape[0])
        self.first = conv(spatial, previous + present, bias=bias)
        self.previous, self.following = conv(previous), conv(following)
        self.minimal = filters_minimally(device, dtype)
        if self.minimal:
            self.sum = conv(spatial / 2, (previous + present + following) / 2, bias=bias)
            self.difference = conv(spatial / 2, (previous - present + following) / 2)
        else:
            self.present = conv(spatial, present, bias=bias)

    def first_frame(self, frame_BHWC: torch.Tensor) -> torch.Tensor:
        """`(B, R+2, W, C)` -> `(1, B, R, W, 2c)`, for the first frame of a clip."""
        return _frames(self.first, frame_BHWC[None])

    def __call__(self, window_TBHWC: torch.Tensor) -> torch.Tensor:
        """`(1 + group * n, B, R+2, W, C)`, the previous frame first -> `(group * n, B, R, W, 2c)`, at least float32."""
        if self.minimal:
            pairs = [self._frame_pair(window_TBHWC, j) for j in range(0, window_TBHWC.shape[0] - 1, 2)]
            return pairs[0] if len(pairs) == 1 else torch.cat(pairs)
        window_TBHWC = window_TBHWC.contiguous()
        groups = (-1, self.group)
        y = _frames(self.present, window_TBHWC[1:])
        motion = y[..., self.width :]
        motion += _frames(self.previous, window_TBHWC[:-1])
        following = window_TBHWC[1:].unflatten(0, groups)[:, 1:]
        motion.unflatten(0, groups)[:, :-1] += _frames(self.following, following.flatten(0, 1)).unflatten(
            0, following.shape[:2]
        )
        return y

    def _frame_pair(self, window_TBHWC: torch.Tensor, j: int) -> torch.Tensor:
        """Outputs of frames j and j+1, counted without the window's first frame."""
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
        y[:1, ..., c:] += _frames(self.previous, x0 - x2)
        y[1:, ..., c:] -= _frames(self.following, x3)
        return y


class PointPair:
    """Pair of 1x1 convolutions, computed as one."""

    def __init__(self, pair: ConvPair, device: torch.device, dtype: torch.dtype) -> None:
        kernel = torch.cat([pair.conv_2d.weight.double(), pair.conv_3d.weight.double()[:, :, 0]])
        self.conv = FrameConv(kernel, _biases(pair), device, dtype)

    def __call__(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        """`(T, B, R, W, C)` -> `(T, B, R, W, 2c)`, at least float32."""
        return _frames(self.conv, x_TBHWC)


def _biases(pair: ConvPair) -> torch.Tensor:
    if pair.conv_2d.bias is None or pair.conv_3d.bias is None:
        raise ValueError("a convolution of a pair has no bias; its published form has one")
    return torch.cat([pair.conv_2d.bias, pair.conv_3d.bias]).double()


def _frames(conv: FrameConv, x_TBHWC: torch.Tensor) -> torch.Tensor:
    """Applies a convolution to every frame of `(T, B, H, W, C)`."""
    y = conv(x_TBHWC.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.unflatten(0, x_TBHWC.shape[:2])

"""Causal depthwise convolution that avoids the slow 3-D depthwise code of PyTorch: on a CPU in its backward pass, on CUDA everywhere.

Takes tokens `B t h w C`, channels last in memory, and a depthwise 3x3x3 kernel; returns as many tokens. Each row depends on itself
and the two before it, zeros before a video's first.

On a CPU PyTorch's backward pass of a depthwise `conv3d` takes several times its forward pass and was a fifth of a training step. Here the
input's gradient is a forward convolution with the flipped kernel, and the kernel's gradient is three 2-D ones, for which oneDNN has
depthwise code. On CUDA a depthwise `conv3d` in channels-last is known to be slow, its backward pass by 10x and more (pytorch#37406,
pytorch#34089): three 2-D convolutions are summed instead. On all devices it computes in the weights' type under autocast as well: on a
CPU the library's backward pass in bfloat16 takes ten times as long, and one `precision` must not be two arithmetics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from model.history import WHOLE, History
from model.layers import no_autocast

HISTORY_ROWS = 2  # past rows that a causal kernel of three needs


def causal_depthwise(
    x_BthwC: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    history: History = WHOLE,
    *,
    conv2d: bool | None = None,
) -> torch.Tensor:
    """`B t h w C` with a kernel `(C, 1, 3, 3, 3)` and a bias `(C,)` -> `B t h w C`, differentiable once.

    `conv2d`: as a sum of 2-D convolutions [default: on CUDA].
    """
    conv2d = x_BthwC.is_cuda if conv2d is None else conv2d
    with no_autocast(x_BthwC):
        x_BthwC = x_BthwC.to(weight.dtype)
        if history is not WHOLE:
            rows = history.extend(x_BthwC, HISTORY_ROWS, axis=1, start="zeros")
            return _summed(rows, weight, bias)[:, HISTORY_ROWS:] if conv2d else _convolved(rows, weight, bias)
        if conv2d:
            return _summed(x_BthwC, weight, bias)
        if x_BthwC.device.type == "cpu":
            return _CausalDepthwise.apply(x_BthwC, weight, bias)
        return _convolved(x_BthwC, weight, bias, (HISTORY_ROWS, 0))


def _summed(x_BthwC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum of three 2-D convolutions, each of all rows with a row of the kernel; zeros come before the first row.

    Each convolves rows whose results are not needed, at most two of them: rows left out would be copies of the input, kept for the
    backward pass.
    """
    B, t = x_BthwC.shape[:2]
    images = x_BthwC.flatten(0, 1).permute(0, 3, 1, 2)  # channels_last without a copy

    def convolved(tap: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = F.conv2d(images, weight[:, :, tap], bias, padding=1, groups=weight.shape[0])
        return y.permute(0, 2, 3, 1).unflatten(0, (B, t))

    y = convolved(HISTORY_ROWS, bias)
    for back in range(1, min(HISTORY_ROWS + 1, t)):
        y[:, back:] += convolved(HISTORY_ROWS - back)[:, : t - back]
    return y


def _convolved(
    x_BthwC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Convolution with this many zero rows before and after."""
    padded = F.pad(x_BthwC, (0, 0, 0, 0, 0, 0, *rows)) if any(rows) else x_BthwC
    x = padded.permute(0, 4, 1, 2, 3)  # channels_last_3d without a copy
    return F.conv3d(x, weight, bias, padding=(0, 1, 1), groups=weight.shape[0]).permute(0, 2, 3, 4, 1)


class _CausalDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BthwC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_BthwC, weight)
        return _convolved(x_BthwC, weight, bias, (HISTORY_ROWS, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BthwC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_BthwC, weight = ctx.saved_tensors
        of_input = _convolved(grad_BthwC, weight.flip(2, 3, 4), None, (0, HISTORY_ROWS))
        taps = [_tap_gradient(x_BthwC, grad_BthwC, HISTORY_ROWS - tap) for tap in range(HISTORY_ROWS + 1)]
        return of_input, torch.stack(taps, dim=2), grad_BthwC.sum((0, 1, 2, 3))


def _tap_gradient(x_BthwC: torch.Tensor, grad_BthwC: torch.Tensor, back: int) -> torch.Tensor:
    """Gradient of the kernel's slice `(C, 1, 3, 3)` that reads `back` rows back."""
    rows, channels = x_BthwC.shape[1] - back, x_BthwC.shape[4]
    if rows < 1:
        return x_BthwC.new_zeros((channels, 1, 3, 3))
    inputs, outputs = (part.flatten(0, 1).permute(0, 3, 1, 2) for part in (x_BthwC[:, :rows], grad_BthwC[:, back:]))
    return conv2d_weight(inputs, (channels, 1, 3, 3), outputs, padding=1, groups=channels)

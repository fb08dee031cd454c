"""Kernel: causal depthwise 3x3x3 convolution and the LayerNorm after it, channel-last, in one pass over memory.

Takes a residual stream `B 2+t h w C` whose first two rows are the past. Returns the convolved stream `B t h w C` in the same dtype, and its
normalised tokens in the dtype of the product that reads them. The caller folds the residual into the kernel's middle tap, and the norm's
affine part into the next product. Sums are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

COLUMNS = 8  # neighbouring tokens per program, which share what they read


def reference(
    padded_BthwC: torch.Tensor, taps_KC: torch.Tensor, bias_C: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same computation in plain PyTorch.

    `taps_KC` float32 `(27, C)`, in order of frame, row, column, where frame 2 is the present; `bias_C` float32.
    """
    channels = padded_BthwC.shape[-1]
    taps = taps_KC.T.reshape(channels, 1, 3, 3, 3)
    stream = padded_BthwC.float().permute(0, 4, 1, 2, 3)
    y = F.conv3d(stream, taps, bias_C, padding=(0, 1, 1), groups=channels).permute(0, 2, 3, 4, 1)
    normed = F.layer_norm(y, (channels,), eps=eps)
    return y.to(padded_BthwC.dtype).contiguous(), normed.to(dtype).contiguous()


def fused(
    padded_BthwC: torch.Tensor, taps_KC: torch.Tensor, bias_C: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference` in one kernel: every program sees all channels of a few neighbouring tokens."""
    batch, rows, height, width, channels = padded_BthwC.shape
    padded_BthwC, rows = padded_BthwC.contiguous(), rows - 2
    y = padded_BthwC.new_empty((batch, rows, height, width, channels))
    normed = torch.empty_like(y, dtype=dtype)
    grid = (batch * rows * height, triton.cdiv(width, COLUMNS))
    block = triton.next_power_of_2(channels)
    _convolve_norm[grid](
        *(padded_BthwC, taps_KC, bias_C, y, normed, rows, height, width, eps),
        CHANNELS=channels,
        COLUMNS=COLUMNS,
        BLOCK=block,
        num_warps=warps(block),
    )
    return y, normed


def warps(block: int) -> int:
    """Warps of a program with `block` channels: enough that its sums and loads fit into registers."""
    return 8 if block >= 512 else 4


@triton.jit
def _convolve_norm(  # type: ignore[no-untyped-def]
    padded_ptr,
    taps_ptr,
    bias_ptr,
    y_ptr,
    normed_ptr,
    rows,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0)  # one line of tokens of one latent row of one video
    i, row, video = line % height, line // height % rows, line // height // rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.arange(0, BLOCK)
    used = channel < CHANNELS

    total = tl.zeros((COLUMNS, BLOCK), dtype=tl.float32)
    for tap_line in range(9):  # not unrolled: more loads in flight would not fit into registers
        frame, up = tap_line // 3, tap_line % 3
        above = i + up - 1 + tl.zeros((COLUMNS,), tl.int32)
        first = ((video * (rows + 2) + row + frame).to(tl.int64) * height + above) * width
        for across in tl.static_range(3):
            beside = column + across - 1
            valid = (above >= 0) & (above < height) & (beside >= 0) & (beside < width)
            source = padded_ptr + (first + beside)[:, None] * CHANNELS + channel[None, :]
            x = tl.load(source, mask=valid[:, None] & used[None, :], other=0.0).to(tl.float32)
            tap = tl.load(taps_ptr + (tap_line * 3 + across) * CHANNELS + channel, mask=used, other=0.0)
            total += x * tap[None, :]
    total += tl.load(bias_ptr + channel, mask=used, other=0.0)[None, :]

    mean = tl.sum(total, axis=1) / CHANNELS
    centred = tl.where(used[None, :], total - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    normed = centred * (1.0 / tl.sqrt(variance + eps))[:, None]

    target = (line.to(tl.int64) * width + column)[:, None] * CHANNELS + channel[None, :]
    inside = (column < width)[:, None] & used[None, :]
    tl.store(y_ptr + target, total.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(normed_ptr + target, normed.to(normed_ptr.dtype.element_ty), mask=inside)

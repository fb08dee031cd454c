"""Kernel: gate of a feed-forward layer, `value * gelu(gate)`, on both halves of one product's output.

Takes the packed product `(N, 2 * hidden)`, value first; returns `(N, hidden)` in the same dtype, computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK = 1024  # columns per program


def reference(packed_NI: torch.Tensor) -> torch.Tensor:
    """The same computation in plain PyTorch."""
    value, gate = packed_NI.float().chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(packed_NI.dtype)


def fused(packed_NI: torch.Tensor) -> torch.Tensor:
    """`reference` in one pass over memory; exact GELU (error function)."""
    packed_NI = packed_NI.contiguous()
    tokens, hidden = packed_NI.shape[0], packed_NI.shape[1] // 2
    gated = packed_NI.new_empty((tokens, hidden))
    _geglu[(tokens, triton.cdiv(hidden, BLOCK))](packed_NI, gated, hidden, BLOCK=BLOCK, num_warps=4)
    return gated


@triton.jit
def _geglu(packed_ptr, gated_ptr, hidden, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)  # token * width may exceed 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(packed_ptr + token * 2 * hidden + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(packed_ptr + token * 2 * hidden + hidden + column, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(gated_ptr + token * hidden + column, (value * gelu).to(gated_ptr.dtype.element_ty), mask=inside)

"""The gate of a feed-forward layer: `value * gelu(gate)`, both halves of one product's output.

Enters: the packed product `(N, 2 * inner)`, value first. Leaves: `(N, inner)` in the same dtype, computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK = 1024  # columns a program handles at a time


def reference(packed_NI: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, in plain PyTorch."""
    value, gate = packed_NI.float().chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(packed_NI.dtype)


def fused(packed_NI: torch.Tensor) -> torch.Tensor:
    """`reference` in one pass over memory; exact GELU (error function)."""
    packed_NI = packed_NI.contiguous()
    tokens, inner = packed_NI.shape[0], packed_NI.shape[1] // 2
    gated = packed_NI.new_empty((tokens, inner))
    _geglu[(tokens, triton.cdiv(inner, BLOCK))](packed_NI, gated, inner, BLOCK=BLOCK, num_warps=4)
    return gated


@triton.jit
def _geglu(packed_ptr, gated_ptr, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)  # times the width it may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    value = tl.load(packed_ptr + token * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(packed_ptr + token * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(gated_ptr + token * inner + column, (value * gelu).to(gated_ptr.dtype.element_ty), mask=inside)

"""GPU kernels in Triton, each with a reference in plain PyTorch, and the choice of whether to use them.

`convolve_norm`, `geglu`, `planes_to_rows`: the kernels. `graphs`: steps recorded once as CUDA graphs. Triton is imported only if the fused
backend is chosen.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

BACKENDS = ("plain", "fused")


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions a fused network runs on. Their signatures and meaning are those of `reference` in each module of this package."""

    convolve_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    geglu: Callable[[torch.Tensor], torch.Tensor]
    planes_to_rows: Callable[..., torch.Tensor]


def choose(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """Backend for a device and dtype: `requested`, or the fastest that is exact up to rounding.

    Fused kernels pay off in 16-bit arithmetic on CUDA, where the time between the products is the larger part. float32 and float64 run
    plain, as does CUDA without Triton (torch for Linux installs it; elsewhere it may be missing).

    Raises:
        ValueError: an unknown backend, or fused kernels that cannot run here.
    """
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = importlib.util.find_spec("triton") is not None
    if requested is None:
        return "fused" if fits and installed else "plain"
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {requested!r}")
    if requested == "fused" and not fits:
        raise ValueError(f"the fused backend runs bfloat16 or float16 on CUDA; got {dtype} on {device}. Use 'plain'")
    if requested == "fused" and not installed:
        raise ValueError(
            "the fused backend needs the package triton, which is not installed. Use 'plain', or install it"
        )
    return requested


def load(backend: str) -> Kernels | None:
    """Kernels of a backend that `choose` returned; None for plain."""
    if backend == "plain":
        return None
    from model.kernels import convolve_norm, geglu, planes_to_rows

    return Kernels(convolve_norm.fused, geglu.fused, planes_to_rows.fused)

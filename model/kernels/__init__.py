"""Kernels for GPUs, each beside the plain PyTorch it stands for, and the one place that decides whether they run.

Enters: a device, an arithmetic and perhaps a wish. Leaves: the name of a backend and its kernels (None: plain PyTorch).
The kernels are written in Triton, which is imported only where they are chosen.

`convolve_norm`, `geglu`, `planes_to_rows`: the kernels. `graphs`: steps recorded once as CUDA graphs.
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
    """What a fused network runs on. Signatures and meaning: the `reference` of each module of this package."""

    convolve_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    geglu: Callable[[torch.Tensor], torch.Tensor]
    planes_to_rows: Callable[..., torch.Tensor]


def choose(device: torch.device, dtype: torch.dtype, wish: str | None = None) -> str:
    """The backend for a device and an arithmetic: `wish`, or the fastest that is exact up to rounding there.

    Fused kernels pay where matrix units make everything between the products the larger part: 16-bit arithmetic on CUDA. float32 and
    float64 run plain, as does CUDA without Triton (torch for Linux brings it; elsewhere it may be missing).

    Raises:
        ValueError: an unknown wish, or fused kernels where they cannot run.
    """
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = importlib.util.find_spec("triton") is not None
    if wish is None:
        return "fused" if fits and installed else "plain"
    if wish not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {wish!r}")
    if wish == "fused" and not fits:
        raise ValueError(f"the fused backend runs bfloat16 or float16 on CUDA; got {dtype} on {device}. Use 'plain'")
    if wish == "fused" and not installed:
        raise ValueError(
            "the fused backend needs the package triton, which is not installed. Use 'plain', or install it"
        )
    return wish


def load(backend: str) -> Kernels | None:
    """The kernels of a backend that `choose` gave; None for plain."""
    if backend == "plain":
        return None
    from model.kernels import convolve_norm, geglu, planes_to_rows

    return Kernels(convolve_norm.fused, geglu.fused, planes_to_rows.fused)

"""Where latents are made: what may matter when numbers differ in the last bit. Recorded in receipts, not part of the fingerprint."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path


def environment(device: str) -> dict[str, str]:
    """Device, machine, CPU model, Python and torch of this process."""
    return {
        "device": device,
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


@cache
def _cpu_model() -> str:
    """As the kernel names it. Empty where it does not: matrix products of other instruction sets give other last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")

"""Where latents are made: what may matter when numbers differ in the last bit. Recorded in receipts, not part of the fingerprint."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pipeline.encoder.compiling import user_settings
from pipeline.encoder.network import load_torch


def environment(device: str, *, compiled: bool = False) -> dict[str, str]:
    """Device, machine, CPU model, Python and torch of this process; on a CPU `threads` of arithmetic, whose number changes sums.

    `compiled`: with `compiler`, the variables by which the user changes what `torch.compile` makes.
    """
    found = {
        "device": device,
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    if device == "cpu":
        found["threads"] = str(load_torch().get_num_threads())
    if compiled:
        found["compiler"] = user_settings()
    return found


@cache
def _cpu_model() -> str:
    """As the kernel names it. Empty where it does not: matrix products of other instruction sets give other last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")

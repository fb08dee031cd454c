"""The device that a benchmark runs on: clock, memory, matrix-product rate.

Takes a device name and a number of arithmetic threads; gives seconds, megabytes, FLOP/s.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


LONGEST_S = 0.05  # of a product. Without instructions for bfloat16 a CPU would take a minute for the next size, at the same rate


class Machine:
    """See the module."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        torch.set_num_threads(threads)
        self._rates: dict[torch.dtype, float] = {}

    @property
    def name(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        model_name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
        return f"{model_name}, {torch.get_num_threads()} threads"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clock(self, run: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def peak_mb(self, run: Callable[[], Any]) -> float:
        """Memory `run` takes on top of what is held before it."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
            run()
            self.wait()
            return (torch.cuda.max_memory_allocated(self.device) - held) / 2**20
        held = _start_of_peak()
        run()
        return (_status_kb("VmHWM") - held) / 1024

    def whole_peak_mb(self, run: Callable[[], Any]) -> float:
        """Memory of the process, or of the device, at its highest during `run`."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            self.wait()
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        _start_of_peak()
        run()
        return _status_kb("VmHWM") / 1024

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of the best plain matrix product here."""
        if dtype not in self._rates:
            best = 0.0
            for n in (4096, 8192) if self.cuda else (256, 1024, 2048):
                a, b = (torch.randn((n, n), device=self.device).to(dtype) for _ in range(2))
                torch.nn.functional.linear(a, b)
                seconds = min(self.clock(lambda a=a, b=b: torch.nn.functional.linear(a, b)) for _ in range(5))
                best = max(best, 2 * n**3 / seconds)
                if seconds > LONGEST_S:
                    break
            self._rates[dtype] = best
        return self._rates[dtype]


def _start_of_peak() -> int:
    """Gives free memory back, resets the high-water mark and returns what is held, in kB (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kb("VmRSS")


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

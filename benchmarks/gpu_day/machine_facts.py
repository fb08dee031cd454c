"""Facts of the machine, and its own rates: matrix products by dtype, copies within the device, to it and from it."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu_day import forms
from pipeline.encoder.compiling import missing_compiler
from pipeline.encoder.staging import BatchCopy

if TYPE_CHECKING:
    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pydantic", "av", "pytest")
COPIED_BYTES = 1 << 31  # of a copy on CUDA: many times the level-2 cache
COPIED_BYTES_CPU = 1 << 24
REPEATS = 5
STAGED_CHUNKS, STAGING_THREADS = 16, (1, 2, 4, 8)


def run(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `facts`."""
    report.measure("machine", lambda: facts(machine))
    if machine.cuda:
        report.measure("nvidia-smi", nvidia_smi)
    for name in settings.dtypes:
        report.measure(
            f"matrix products, {name}", lambda name=name: {"flop_per_s": machine.matrix_rate(getattr(torch, name))}
        )
    report.measure("copies", lambda: copy_rates(machine))
    report.measure("staging of chunks", staging_rates)


def facts(machine: Machine) -> dict[str, Any]:
    """Names and versions; memory in bytes."""
    found: dict[str, Any] = {
        "name": machine.name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": {name: _version(name) for name in PACKAGES},
        "lacks_for_compiling": missing_compiler(machine.device.type),
    }
    if machine.cuda:
        properties: Any = torch.cuda.get_device_properties(machine.device)
        found |= {
            "devices": torch.cuda.device_count(),
            "capability": torch.cuda.get_device_capability(machine.device),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power limit as the driver reports them."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    return dict(zip(fields, (part.strip() for part in line.split(",")), strict=True))


def copy_rates(machine: Machine) -> dict[str, float]:
    """Bytes a second: within the device (read and written bytes both count), to it from pinned memory, and back."""
    size = COPIED_BYTES if machine.cuda else COPIED_BYTES_CPU
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    host = torch.ones(size, dtype=torch.uint8, pin_memory=machine.cuda)

    def fastest(to: torch.Tensor, of: torch.Tensor) -> float:
        to.copy_(of)
        return min(machine.clock(lambda: to.copy_(of, non_blocking=True)) for _ in range(REPEATS))

    return {
        "device_bytes_per_s": 2 * size / fastest(target, source),
        "to_device_bytes_per_s": size / fastest(target, host),
        "from_device_bytes_per_s": size / fastest(host, target),
    }


def staging_rates() -> dict[str, float]:
    """Bytes a second of copying chunks of 16x256x256 into one batch in host memory, by number of threads."""
    chunks = forms.random_clips((16, 256, 256), STAGED_CHUNKS)
    batch = np.ones((len(chunks), *chunks[0].shape), np.uint8)
    found = {}
    for threads in STAGING_THREADS:
        copy = BatchCopy(threads)
        copy.fill(batch, chunks)
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            copy.fill(batch, chunks)
            times.append(time.perf_counter() - begun)
        found[f"{threads}"] = batch.nbytes / min(times)
    return found


def _version(package: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "without metadata"

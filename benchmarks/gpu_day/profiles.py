"""Launches of a run, and its time by kernel, from torch's profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.machine import Machine

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # also their newer forms, which begin so
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")
SHOWN = 25


def launches(machine: Machine, run: Callable[[], Any]) -> dict[str, int] | None:
    """Calls that launch kernels, and calls that launch whole graphs; None on a CPU."""
    if not machine.cuda:
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        machine.wait()
    counts = {"kernels": 0, "graphs": 0}
    for event in trace.key_averages():
        for what, names in (("kernels", LAUNCHES), ("graphs", GRAPHS)):
            if event.key.startswith(names):
                counts[what] += event.count
    return counts


def by_kernel(machine: Machine, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Kernels by device time, longest first: name, calls, milliseconds, share of all. On a CPU: operators by their own time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.cuda else [])]
    with profile(activities=activities) as trace:
        run()
        machine.wait()
    found = []
    for event in trace.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device == machine.cuda:
            found.append((event.self_device_time_total if machine.cuda else event.self_cpu_time_total, event))
    total = sum(time for time, _ in found)
    found.sort(key=lambda item: -item[0])
    return [
        {"kernel": event.key[:160], "calls": event.count, "ms": time / 1e3, "share": time / total if total else 0.0}
        for time, event in found[:SHOWN]
    ]

"""Training step of one network: forward and backward of the L1 loss in bfloat16 autocast and in float32, with and without recomputation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from model.training.networks import trainable

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine

REPEATS = 3


def run(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `training`."""
    for precision in ("bfloat16", "float32"):
        for recompute in (False, True):
            name = f"{precision}{', recomputed' if recompute else ''}"
            report.measure(name, lambda p=precision, r=recompute: step(settings, machine, p, recompute=r))


def step(settings: Settings, machine: Machine, precision: str, *, recompute: bool) -> dict[str, Any]:
    """Seconds of the forward pass and of the whole step, frames a second, peak memory."""
    batch, clip = settings.training
    network: Any = trainable(settings.network, settings.config(settings.network), recompute=recompute)
    module = cast("nn.Module", network).to(machine.device)
    low, high = network.spec.value_range
    video = low + (high - low) * torch.rand((batch, 3, *clip), device=machine.device)
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def forward() -> torch.Tensor:
        with autocast:
            reconstruction = network(video).video_BCTHW
        return (reconstruction - video).abs().mean()

    def whole() -> None:
        module.zero_grad(set_to_none=True)
        forward().backward()

    whole()  # compiles, chooses algorithms
    peak_mb = machine.peak_mb(whole)
    forward_s = min(machine.clock(forward) for _ in range(REPEATS))
    whole_s = min(machine.clock(whole) for _ in range(REPEATS))
    return {
        "clips": batch,
        "clip": clip,
        "forward_s": forward_s,
        "step_s": whole_s,
        "frames_per_s": batch * clip[0] / whole_s,
        "peak_mb": peak_mb,
    }

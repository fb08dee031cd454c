"""Whether a build of a job would compile its network, and what that takes and saves. Takes the listed inputs and the planned clips."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.encoder import cuda_available, resolve_device
from pipeline.encoder.compiling import compile_s, missing_compiler, saved_core_s, why_never_compiled
from pipeline.engine.driver.compile_estimate import CompileChoice, estimate
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.interface import LatentSpec
    from pipeline.config import EncodeJob
    from pipeline.forecast.totals import BucketFill
    from pipeline.records import ClipRules, Shard


@dataclass(frozen=True, slots=True)
class CompileForecast:
    """Whether a build into a new output compiles its network. What it takes and saves is 0 where it does not."""

    on: bool
    reason: str
    sizes: int = 0  # frame sizes of the planned clips
    compile_s: float = 0.0  # seconds that each encoder compiles these sizes
    saved_core_s: float = (
        0.0  # seconds of CPU cores that compiled steps save over all planned clips; 0 where it is not known, as on GPUs
    )


def compile_choice(job: EncodeJob, spec: LatentSpec, rules: ClipRules, shards: Sequence[Shard]) -> CompileChoice:
    """The choice of a build of these inputs into a new output, whose encoders have the CPU cores of this machine.

    Raises:
        ConfigError: as `encode`: the job asks for a compiled network of diffusers.
    """
    asked = job.engine.compile
    if (never := why_never_compiled(spec.network)) is not None:
        if asked == "on":
            raise ConfigError(f"engine.compile: got on, and {never}; use auto or off")
        return CompileChoice(False, never)
    if asked != "auto":
        return _with_what_is_missing(CompileChoice(asked == "on", f"engine.compile={asked}"), job)

    def estimated(device: str, compute_dtype: str) -> CompileChoice:
        return estimate(spec.to_dict(), rules, shards, device, compute_dtype, lambda: float(os.cpu_count() or 1))

    choice = estimated(*resolve_device(job.model.device, job.model.compute_dtype, cuda=False))
    choice = estimated(*_device(job)) if choice.on else choice  # what is off on a CPU is off on a GPU
    return _with_what_is_missing(choice, job)


def _with_what_is_missing(choice: CompileChoice, job: EncodeJob) -> CompileChoice:
    missing = missing_compiler(_device(job)[0]) if choice.on else None
    return choice if missing is None else replace(choice, reason=f"{choice.reason}; here {missing}")


def forecast_compiling(
    choice: CompileChoice, job: EncodeJob, spec: LatentSpec, buckets: Mapping[str, BucketFill]
) -> CompileForecast:
    """What `choice` means for the planned clips, by bucket: `{"17x256x256": ...}`."""
    if not choice.on:
        return CompileForecast(False, choice.reason)
    sizes, pixels = set(), 0
    for name, fill in buckets.items():
        height, width = (int(side) for side in name.split("x")[-2:])
        sizes.add((height, width))
        pixels += fill.frames * height * width
    on_cpu = not _device(job)[0].startswith("cuda")
    saved = (saved_core_s(spec.network) or 0.0) * pixels / 1e6 if on_cpu else 0.0
    return CompileForecast(True, choice.reason, len(sizes), compile_s(spec.network) * len(sizes), saved)


def _device(job: EncodeJob) -> tuple[str, str]:
    """Device and compute dtype on this machine. With `auto` it imports torch, which takes seconds: called only where it matters."""
    config = job.model
    return resolve_device(config.device, config.compute_dtype, cuda=config.device == "auto" and cuda_available())

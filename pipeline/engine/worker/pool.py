"""Interface of a set of workers, `WorkerPool`, with the events it reports, and `InlinePool`: one encode loop in this process.

Takes assignments of shards, gives events. `engine/ray/pool.py` has the other implementation.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.encoder import Encoder
from pipeline.engine.decoders.lanes import niceness_beside
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.engine.nvdec.lanes import NvdecLanes
from pipeline.engine.worker.device_fault import device_fault
from pipeline.engine.worker.encode_loop import EncodeLoop, ShardFailure
from pipeline.errors import BuildError, CheckpointDiffers
from pipeline.format.stored import I2V_COND

if TYPE_CHECKING:
    from pipeline.engine.driver.dispatch import Cause
    from pipeline.engine.worker.blamed_video import BlamedVideo, StepVideo
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.shard_result import ShardResult
    from pipeline.engine.worker.worker_stats import WorkerStats
    from pipeline.records import Shard

IDLE_S = 0.05  # a poll with nothing in flight; short, so that the driver soon sees signals and answers of probes
PULSE_S = 0.5  # between pulses
MOST_DECODERS = 16  # per encoder, unless the job says otherwise


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker can take shards. `node`: where it runs; "" if there is only one place."""

    worker: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class ShardEnded:
    """A shard attempt ended, well or not."""

    worker: str
    outcome: ShardResult | ShardFailure


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker died or was killed, and the shards it held with it. For `cause` and `step` see `Dispatcher.on_lost`."""

    worker: str
    error: Exception
    cause: Cause = "unexplained"
    step: tuple[StepVideo, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker's node goes away in `left_s` seconds; inf: at an unknown time. Repeated with the time that is left then."""

    worker: str
    left_s: float


@dataclass(frozen=True, slots=True)
class NodeAvoided:
    """A node gets no encoder for the time being; `text` is the line for the user."""

    node: str
    text: str


@dataclass(frozen=True, slots=True)
class Pulse:
    """Live numbers of a worker, reported every few seconds."""

    worker: str
    stats: WorkerStats


@dataclass(frozen=True, slots=True)
class Notice:
    """A line for the user."""

    text: str


PoolEvent = WorkerUp | ShardEnded | WorkerGone | WorkerDraining | NodeAvoided | Pulse | Notice


class WorkerPool(Protocol):
    """A set of encoders."""

    size: int

    def start(self, wanted: int) -> None:
        """Brings the number of workers up to `wanted`; `WorkerUp` follows for each."""
        ...

    def assign(self, worker: str, shard: Shard, blamed: tuple[BlamedVideo, ...] = ()) -> None:
        """Hands a shard over, with its videos that ended workers; `ShardEnded` or `WorkerGone` follows."""
        ...

    def hand_back(self, worker: str, shard_ids: list[str]) -> None:
        """Ends these attempts, which delete their files; `ShardEnded` with `HandedBack` follows for each that has not ended before."""
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Events since the last call; waits up to `timeout_s` for the first.

        Raises:
            FatalError: the build must stop.
        """
        ...

    def close(self) -> None:
        """Ends all workers; attempts in flight are abandoned."""
        ...


def decoders_per_encoder(job_decoders: int | None, cores: int, encoders: int) -> int:
    """Decoder processes for one encoder: the number the job gives, else the encoder's share of the cores."""
    return job_decoders or max(1, min(MOST_DECODERS, cores // encoders))


def make_encoder(context: BuildContext, threads: int | None) -> Encoder:
    """Loads the network of a build on its device. Slow.

    Raises:
        CheckpointDiffers: its weights are not those of the fingerprint.
        ConfigError, CheckpointError, AccessError: see `Encoder`.
    """
    job, device, dtype = context.job, context.device, context.compute_dtype
    stored: dict[str, Any] = {"moments": job.write.moments, "conditions": I2V_COND in job.write.store}
    sizes: dict[str, Any] = {"batch": job.engine.batch, "state_bytes": job.engine.state_bytes}
    encoder = Encoder(job.model, device, dtype, **stored, **sizes, threads=threads, compiled=context.compiled)
    if (found := encoder.network().identity) != context.identity:
        raise CheckpointDiffers(
            f"the checkpoint on {socket.gethostname()} is damaged or old, or was replaced since the build began: "
            f"{_difference(found, context.identity)}; delete the copy there (LATHE_CACHE), or run again to encode with new weights"
        )
    return encoder


def _difference(found: dict[str, Any], planned: dict[str, Any]) -> str:
    """What differs between the identity of a loaded network and the planned one, in one short line."""
    name = next(name for name in sorted({*found, *planned}) if found.get(name) != planned.get(name))
    return f"{name} is {str(found.get(name))[:12]}, planned was {str(planned.get(name))[:12]}"


class InlinePool:
    """One worker: an encode loop driven by `poll`, with decoders as child processes."""

    size = 1
    _NAME = "inline"

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._loop: EncodeLoop | None = None
        self._announced = False
        self._pulse_at = 0.0

    def start(self, wanted: int) -> None:  # noqa: D102
        if wanted < 1 or self._loop is not None:
            return
        job = self._context.job
        cores = os.cpu_count() or 1
        # Decoders first: they import and warm up while the network loads.
        decoders, niceness = decoders_per_encoder(job.engine.decoders, cores, 1), niceness_beside(self._context.device)
        lanes: ProcessLanes
        if job.decode.device == "cuda":
            lanes = NvdecLanes(decoders, job.decode.memory_bytes, self._context.device)
        else:
            lanes = ProcessLanes(decoders, job.decode.memory_bytes, niceness)
        try:
            self._loop = EncodeLoop(self._context, make_encoder(self._context, job.engine.threads), lanes)
        except BaseException:
            lanes.close()
            raise

    def assign(self, worker: str, shard: Shard, blamed: tuple[BlamedVideo, ...] = ()) -> None:  # noqa: D102
        self._running().submit(shard, blamed)

    def hand_back(self, worker: str, shard_ids: list[str]) -> None:  # noqa: D102
        self._running().hand_back(shard_ids)

    def poll(self, timeout_s: float) -> list[PoolEvent]:  # noqa: D102
        loop = self._running()
        if not self._announced:
            self._announced = True
            return [WorkerUp(self._NAME)]
        if not loop.shards_in_flight:  # the build waits for its store
            time.sleep(min(timeout_s, IDLE_S))
            return []
        deadline = time.monotonic() + timeout_s
        events: list[PoolEvent] = []
        while not events and time.monotonic() < deadline and loop.shards_in_flight:
            try:
                events += [ShardEnded(self._NAME, outcome) for outcome in loop.step()]
            except RuntimeError as error:
                if (fault := device_fault(error)) is None:
                    raise
                raise BuildError(f"the device failed: {fault}; the same command resumes") from error
            if time.monotonic() - self._pulse_at > PULSE_S:
                self._pulse_at = time.monotonic()
                events.append(Pulse(self._NAME, loop.live_stats()))
        return events

    def close(self) -> None:  # noqa: D102
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _running(self) -> EncodeLoop:
        if self._loop is None:
            raise RuntimeError("start() first")
        return self._loop

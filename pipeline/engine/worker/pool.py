"""What the driver needs of an executor: workers that take shards and report what became of them. No Ray here.

Enters: assignments. Leaves: events. `InlinePool` is one encode loop in this process; `RayPool` (in `ray_pool`) is actors.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.encoder import Encoder
from pipeline.engine.decoders.lanes import ProcessLanes, niceness_beside
from pipeline.engine.worker.encode_loop import EncodeLoop, ShardFailure, describe_stats

if TYPE_CHECKING:
    from pipeline.engine.driver.dispatch import Cause
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.shard_result import ShardResult
    from pipeline.records import Shard

IDLE_S = 0.05  # a poll with nothing in flight; short, so that signals and answers of probes are seen soon
MOST_DECODERS = 16  # per encoder, unless the job says otherwise


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker can take shards."""

    worker: str


@dataclass(frozen=True, slots=True)
class ShardEnded:
    """A shard attempt ended, well or not."""

    worker: str
    outcome: ShardResult | ShardFailure


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker died or was killed, with all it held. `cause` says who is to blame, see `dispatch`."""

    worker: str
    error: Exception
    cause: Cause = "unexplained"


@dataclass(frozen=True, slots=True)
class Pulse:
    """Live numbers of a worker."""

    worker: str
    stats: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know."""

    text: str


PoolEvent = WorkerUp | ShardEnded | WorkerGone | Pulse | Notice


class WorkerPool(Protocol):
    """A set of encoders."""

    size: int

    def start(self, wanted: int) -> None:
        """Brings the number of workers up to `wanted`; `WorkerUp` follows for each."""
        ...

    def assign(self, worker: str, shard: Shard) -> None:
        """Hands a shard over; `ShardEnded` or `WorkerGone` follows."""
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """What happened, waiting up to `timeout_s` for something to.

        Raises:
            FatalError: the build must stop.
        """
        ...

    def close(self) -> None:
        """Ends all workers; attempts in flight are abandoned."""
        ...


def decoders_per_encoder(job_decoders: int | None, cores: int, encoders: int) -> int:
    """Decoder processes for one encoder: what the job says, else its share of the cores."""
    return job_decoders or max(1, min(MOST_DECODERS, cores // encoders))


class InlinePool:
    """One worker: an encode loop driven by `poll`, with decoders as child processes."""

    size = 1
    _NAME = "inline"

    def __init__(self, context: BuildContext) -> None:
        self._blueprint = context
        self._loop: EncodeLoop | None = None
        self._announced = False
        self._pulse_at = 0.0

    def start(self, wanted: int) -> None:  # noqa: D102
        if wanted < 1 or self._loop is not None:
            return
        job = self._blueprint.job
        cores = os.cpu_count() or 1
        # Decoders first: they import and warm up while the network loads.
        lanes = ProcessLanes(
            decoders_per_encoder(job.engine.decoders, cores, 1),
            job.decode.memory_bytes,
            niceness_beside(self._blueprint.device),
        )
        encoder = Encoder(
            job.model,
            self._blueprint.device,
            self._blueprint.compute_dtype,
            moments=job.write.moments,
            threads=job.engine.threads,
            batch=job.engine.batch,
        )
        self._loop = EncodeLoop(self._blueprint, encoder, lanes)

    def assign(self, worker: str, shard: Shard) -> None:  # noqa: D102
        self._running().submit(shard)

    def poll(self, timeout_s: float) -> list[PoolEvent]:  # noqa: D102
        loop = self._running()
        if not self._announced:
            self._announced = True
            return [WorkerUp(self._NAME)]
        if not loop.shards_in_flight:  # a build that waits for its store
            time.sleep(min(timeout_s, IDLE_S))
            return []
        deadline = time.monotonic() + timeout_s
        events: list[PoolEvent] = []
        while not events and time.monotonic() < deadline and loop.shards_in_flight:
            events += [ShardEnded(self._NAME, outcome) for outcome in loop.step()]
            if time.monotonic() - self._pulse_at > 0.5:
                self._pulse_at = time.monotonic()
                events.append(Pulse(self._NAME, describe_stats(loop.stats)))
        return events

    def close(self) -> None:  # noqa: D102
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _running(self) -> EncodeLoop:
        if self._loop is None:
            raise RuntimeError("start() first")
        return self._loop

"""`WorkerPool` of simulated encoders for `scale.py`: shards take time on a clock, nothing is fetched, decoded or encoded.

Encoders come up one by one, report pulses as Ray's do, fail some attempts, are preempted and replaced. The clock is the machine's, or one
that jumps to the next event: then a build of hours takes as long as the driver computes.
"""

from __future__ import annotations

import heapq
import itertools
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import PoolEvent, Pulse, ShardEnded, WorkerGone, WorkerUp
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.errors import LatheError, StorageUnavailable, WorkerLost
from pipeline.records import Counts, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.records import Shard

PULSE_S, PULSES_A_SECOND = 2.0, 100  # as `pipeline.engine.ray.pool`
REPLACED_S = 60.0  # until another machine is up in place of one that was taken
REASONS = tuple(f"reason_{n}" for n in range(60))  # as many as docs/rejects.md has, about
COUNTS = Counts(samples=110, encoded=100, rejected=10, clips_planned=200, clips=200, frames=3400)


@dataclass(slots=True)
class _Encoder:
    free_at: float
    shards: dict[str, tuple[Shard, float, float]] = field(default_factory=dict)  # with start and end
    ended: int = 0


class SimulatedPool:
    """See the module. `cpu_s`: what the simulation itself used, in the thread of the driver.

    Args:
        fingerprint: of the build.
        workers: number of encoders.
        shard_s: seconds of encoding a shard, on average.
        real: whether the clock is the machine's.
        faults: share of attempts that fail, half of them in the store of the inputs.
        life_s: average time until an encoder is preempted.
        measured: (from, to) on the clock: the driver's CPU seconds between the two are taken, then `Enough` is raised.
    """

    def __init__(
        self,
        fingerprint: str,
        workers: int,
        shard_s: float,
        *,
        real: bool = False,
        faults: float = 0.01,
        life_s: float = 7200.0,
        measured: tuple[float, float] | None = None,
    ) -> None:
        self.size = workers
        self.cpu_s = 0.0
        self.counts: Counter[str] = Counter()
        self.measured_cpu_s = 0.0
        self._fingerprint, self._shard_s, self._real = fingerprint, shard_s, real
        self._faults, self._life_s, self._measured = faults, life_s, measured
        self._began = time.monotonic()
        self._now = 0.0
        self._cpu_at: float | None = None
        self._random = random.Random(0)
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, str, str, str]] = []  # heap: when, number, what, encoder, shard id
        self._encoders: dict[str, _Encoder] = {}
        self._period = max(PULSE_S, workers / PULSES_A_SECOND)

    def now(self) -> float:
        """Seconds on the clock."""
        return time.monotonic() - self._began if self._real else self._now

    def start(self, wanted: int) -> None:
        """They come up over five seconds."""
        for n in range(wanted):
            self._at(5.0 * n / wanted, "up")

    def assign(self, worker: str, shard: Shard, blamed: tuple[BlamedVideo, ...] = ()) -> None:
        """It begins when the encoder has ended those before."""
        begun = time.thread_time()
        self.counts["assigned"] += 1
        encoder = self._encoders[worker]
        start = max(self.now(), encoder.free_at)
        seconds = self._shard_s * self._random.lognormvariate(-0.045, 0.3)  # of mean 1
        if not encoder.ended and not encoder.shards:  # shards end evenly from the start, as they do later
            seconds *= self._random.random()
        encoder.free_at = end = start + seconds
        shard_id = shard.id(self._fingerprint)
        encoder.shards[shard_id] = shard, start, end
        self._at(end, "end", worker, shard_id)
        self.cpu_s += time.thread_time() - begun

    def hand_back(self, worker: str, shard_ids: list[str]) -> None:
        """Not called: no node is drained."""

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """The next events; on a clock that jumps one at a time, which costs the driver most."""
        begun = time.thread_time()
        self._measure()
        until = self.now() + timeout_s
        due = min(until, self._agenda[0][0]) if self._agenda else until
        if self._real:
            time.sleep(max(0.0, due - self.now()))
        else:
            self._now = max(self._now, due)
        events: list[PoolEvent] = []
        while self._agenda and self._agenda[0][0] <= self.now():
            _, _, what, worker, shard_id = heapq.heappop(self._agenda)
            events += getattr(self, f"_{what}")(worker, shard_id)
        self.cpu_s += time.thread_time() - begun
        return events

    def close(self) -> None:
        """Nothing to end."""

    def _at(self, when: float, what: str, worker: str = "", shard_id: str = "") -> None:
        heapq.heappush(self._agenda, (when, next(self._numbers), what, worker, shard_id))

    def _measure(self) -> None:
        if self._measured is None:
            return
        first, last = self._measured
        used = time.process_time() - self.cpu_s
        if self._cpu_at is None and self.now() >= first:
            self._cpu_at = used
            self.counts.clear()
        elif self._cpu_at is not None and self.now() >= last:
            self.measured_cpu_s = used - self._cpu_at
            raise Enough

    # --- events -------------------------------------------------------------------------------------------------------

    def _up(self, _worker: str, _shard: str) -> list[PoolEvent]:
        worker = f"encoder-{next(self._numbers)}"
        self._encoders[worker] = _Encoder(self.now())
        self._at(self.now() + self._random.uniform(0, self._period), "pulse", worker)
        self._at(self.now() + self._random.expovariate(1 / self._life_s), "gone", worker)
        return [WorkerUp(worker)]

    def _gone(self, worker: str, _shard: str) -> list[PoolEvent]:
        self.counts["preempted"] += 1
        del self._encoders[worker]
        self._at(self.now() + REPLACED_S, "up")
        return [WorkerGone(worker, WorkerLost(f"{worker} lost: its node was preempted"), "preempted")]

    def _pulse(self, worker: str, _shard: str) -> list[PoolEvent]:
        if (encoder := self._encoders.get(worker)) is None:
            return []
        self.counts["pulses"] += 1
        self._at(self.now() + self._period, "pulse", worker)
        done = {
            shard_id: int(shard.num_bytes * min(1.0, max(0.0, (self.now() - start) / max(end - start, 1e-9))))
            for shard_id, (shard, start, end) in encoder.shards.items()
        }
        stats = WorkerStats(encoder.ended * COUNTS.frames, encoder.ended * COUNTS.clips, lanes_ready=8, bytes_done=done)
        return [Pulse(worker, stats)]

    def _end(self, worker: str, shard_id: str) -> list[PoolEvent]:
        encoder = self._encoders.get(worker)
        if encoder is None or shard_id not in encoder.shards:
            return []
        self.counts["ended"] += 1
        shard, _, _ = encoder.shards.pop(shard_id)
        encoder.ended += 1
        if self._random.random() < self._faults:
            self.counts["failed"] += 1
            return [ShardEnded(worker, ShardFailure(shard_id, self._failure(shard)))]
        rejects = {reason: 1 for reason in self._random.sample(REASONS, 10)}
        steps, warnings = {"17x256x256": 8}, {"no_caption": 3}
        done = ShardResult(shard_id, True, COUNTS, COUNTS, Timings(total_s=1.0), 10**9, rejects, 1, warnings, steps)
        return [ShardEnded(worker, done)]

    def _failure(self, shard: Shard) -> LatheError:
        if self._random.random() < 0.5:
            return StorageUnavailable("host:9000 did not answer (ReadTimeout)", uri=shard.objects[0].uri)
        return LatheError("the decoder ended with signal 11")


class Enough(Exception):
    """The measured time is over."""


@contextmanager
def clock_of(pool: SimulatedPool) -> Iterator[None]:
    """The modules of the driver read the clock of `pool` as time.monotonic()."""
    found = [module for name, module in sys.modules.items() if name.startswith("pipeline.engine.driver.")]
    modules: list[Any] = [module for module in found if vars(module).get("time") is time]
    replaced = SimpleNamespace(**{**vars(time), "monotonic": pool.now})
    for module in modules:
        module.time = replaced
    try:
        yield
    finally:
        for module in modules:
            module.time = time

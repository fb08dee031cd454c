"""CPU time of the driver's loop per shard: 100,000 shards through a `Build` with a pool of plain objects.

Takes numbers of shards and workers; prints one line per number of workers, and the ratio of the most to the fewest. There is no Ray, store
or network: what remains is assigning shards, counting, live numbers and the display, as `RayPool` drives it (one event a poll by default).
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import resource
import tempfile
import time
from types import SimpleNamespace
from typing import Any

from pipeline.config import EncodeJob
from pipeline.engine.driver.build import Build
from pipeline.engine.driver.progress import Silent
from pipeline.engine.driver.report import BuildReport
from pipeline.engine.worker.pool import PoolEvent, Pulse, ShardEnded, WorkerUp
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.records import Counts, Shard, SourceObject, Timings
from pipeline.storage.local import LocalStore

BAR_US, BAR_RATIO = 250, 1.5
FINGERPRINT = "f" * 32


class InstantPool:
    """Workers that end their shards in a random order, without doing anything. A pulse every `pulse_every` events."""

    def __init__(self, workers: int, batch: int, pulse_every: int) -> None:
        self.size = workers
        self._batch = batch
        self._pulse_every = pulse_every
        self._random = random.Random(0)
        self._running: list[tuple[float, str, str]] = []
        self._up: list[PoolEvent] = []
        self._clock = 0.0
        self._polls = 0

    def start(self, wanted: int) -> None:
        """All are up at once."""
        self._up += [WorkerUp(f"encoder-{n}") for n in range(wanted)]

    def assign(self, worker: str, shard: Shard) -> None:
        """Ends after a random time of the pool's own clock."""
        ends = self._clock + self._random.uniform(1.0, 2.0)
        heapq.heappush(self._running, (ends, worker, shard.id(FINGERPRINT)))

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """The next shards that end."""
        if self._up:
            up, self._up = self._up, []
            return up
        events: list[PoolEvent] = []
        while self._running and len(events) < self._batch:
            self._clock, worker, shard_id = heapq.heappop(self._running)
            counts = Counts(samples=10, encoded=10, clips=20, frames=340)
            events.append(ShardEnded(worker, ShardResult(shard_id, True, counts, counts, Timings(), 1, {}, 1)))
        self._polls += 1
        if self._polls % self._pulse_every == 0:
            events.append(Pulse(f"encoder-{self._polls % self.size}", WorkerStats(frames=self._polls, clips=1)))
        return events

    def close(self) -> None:
        """Nothing to end."""


def measure(shards: int, workers: int, batch: int) -> dict[str, float]:
    """CPU seconds of one whole build, by shard."""
    with tempfile.TemporaryDirectory() as folder:
        job = EncodeJob(inputs=("in",), output=folder)
        todo = [
            Shard("tar", f"{n:06d}.tar", (SourceObject(f"in/{n:06d}.tar", 1000 + n % 997, "e"),)) for n in range(shards)
        ]
        pool = InstantPool(workers, batch, pulse_every=3)
        context: Any = SimpleNamespace(job=job, fingerprint=FINGERPRINT)
        executor: Any = SimpleNamespace(pool=lambda _: pool)
        report = BuildReport(folder, FINGERPRINT, "none", True, "cpu", shards, 0)
        begun, cpu = time.perf_counter(), time.process_time()
        Build(todo, context, executor, LocalStore(folder), Silent(), report, time.monotonic()).run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - begun
    if not report.ok or report.shards_done != shards:
        raise SystemExit(f"{report.shards_done} of {shards} shards done")
    return {
        "shards": shards,
        "workers": workers,
        "cpu_us_a_shard": cpu / shards * 1e6,
        "wall_s": wall,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Prints a line a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", default="100,1000", help="comma-separated")
    parser.add_argument("--batch", type=int, default=1, help="events a poll")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    runs = [measure(arguments.shards, int(workers), arguments.batch) for workers in arguments.workers.split(",")]
    for run in runs:
        print(
            f"{run['shards']:.0f} shards, {run['workers']:.0f} workers: {run['cpu_us_a_shard']:.0f} us CPU a shard, {run['wall_s']:.1f} s, "
            f"{run['rss_mib']:.0f} MiB"
        )
    most, fewest = runs[-1], runs[0]
    print(
        f"RESULT {most['cpu_us_a_shard']:.0f} <= {BAR_US} us CPU a shard in the driver, {most['workers']:.0f} workers"
    )
    ratio = most["cpu_us_a_shard"] / fewest["cpu_us_a_shard"]
    print(f"RESULT {ratio:.2f} <= {BAR_RATIO} the same, of {fewest['workers']:.0f} workers")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(runs, file, indent=1)


if __name__ == "__main__":
    main()

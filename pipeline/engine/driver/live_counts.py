"""Latest pulses of a build's workers, and their sums: frames, clips, source bytes inside the shards that run; what each worker does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.engine.driver.worker_activity import Activity, activity

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.engine.worker.worker_stats import WorkerStats

WINDOW_S = 30.0  # over which rates and shares are taken: one to two of them


@dataclass(slots=True)
class _Worker:
    """A worker's latest pulse, and the two at which its present and last window began."""

    stats: WorkerStats
    at: float
    window: tuple[WorkerStats, float]
    before: tuple[WorkerStats, float]


class LiveCounts:
    """Latest statistics of each worker, with running sums of frames and clips (O(1) to read)."""

    def __init__(self) -> None:
        self.frames = 0
        self.clips = 0
        self._workers: dict[str, _Worker] = {}

    def pulse(self, worker: str, stats: WorkerStats, now: float | None = None) -> None:
        """Replaces the worker's earlier numbers. `now` in seconds, by default of time.monotonic()."""
        now = time.monotonic() if now is None else now
        found = self._workers.get(worker)
        if found is None:
            self._workers[worker] = _Worker(stats, now, (stats, now), (stats, now))
            self.frames += stats.frames
            self.clips += stats.clips
            return
        self.frames += stats.frames - found.stats.frames
        self.clips += stats.clips - found.stats.clips
        found.stats, found.at = stats, now
        if now - found.window[1] >= WINDOW_S:
            found.before, found.window = found.window, (stats, now)

    def remove(self, worker: str) -> None:
        """Takes the worker's numbers out of the sums."""
        if (found := self._workers.pop(worker, None)) is not None:
            self.frames -= found.stats.frames
            self.clips -= found.stats.clips

    def ended(self, worker: str, shard_id: str) -> None:
        """An attempt has ended: its bytes no longer count, so that another attempt of the shard begins at 0."""
        if (found := self._workers.get(worker)) is not None:
            found.stats.bytes_done.pop(shard_id, None)

    def bytes_of(self, worker: str, shard_id: str) -> int:
        """Source bytes that the worker has done of a shard."""
        found = self._workers.get(worker)
        return found.stats.bytes_done.get(shard_id, 0) if found is not None else 0

    def bytes_inside(self, running: Collection[str]) -> int:
        """Source bytes done inside the shards `running`. Of several attempts at one shard the furthest counts."""
        furthest: dict[str, int] = {}
        for found in self._workers.values():
            for shard_id, done in found.stats.bytes_done.items():
                if shard_id in running:
                    furthest[shard_id] = max(done, furthest.get(shard_id, 0))
        return sum(furthest.values())

    def compile_s(self) -> float:
        """Seconds that an encoder has spent compiling so far, on average: they say nothing of its rate."""
        return sum(found.stats.compile_s for found in self._workers.values()) / max(1, len(self._workers))

    def activities(self) -> dict[str, Activity]:
        """What each worker with a pulse has done in the last one to two windows."""
        return {
            name: activity(item.before[0], item.stats, item.at - item.before[1]) for name, item in self._workers.items()
        }

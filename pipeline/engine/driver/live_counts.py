"""Latest pulses of a build's workers, and their sums: frames, clips, and source bytes inside the shards that run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.engine.worker.worker_stats import WorkerStats


class LiveCounts:
    """Latest statistics of each worker, with running sums of frames and clips (O(1) to read)."""

    def __init__(self) -> None:
        self.frames = 0
        self.clips = 0
        self._latest: dict[str, WorkerStats] = {}

    def pulse(self, worker: str, stats: WorkerStats) -> None:
        """Replaces the worker's earlier numbers."""
        self.remove(worker)
        self._latest[worker] = stats
        self.frames += stats.frames
        self.clips += stats.clips

    def remove(self, worker: str) -> None:
        """Takes the worker's numbers out of the sums."""
        if (before := self._latest.pop(worker, None)) is not None:
            self.frames -= before.frames
            self.clips -= before.clips

    def ended(self, worker: str, shard_id: str) -> None:
        """An attempt has ended: its bytes no longer count, so that another attempt of the shard begins at 0."""
        if (stats := self._latest.get(worker)) is not None:
            stats.bytes_done.pop(shard_id, None)

    def bytes_of(self, worker: str, shard_id: str) -> int:
        """Source bytes that the worker has done of a shard."""
        stats = self._latest.get(worker)
        return stats.bytes_done.get(shard_id, 0) if stats is not None else 0

    def bytes_inside(self, running: Collection[str]) -> int:
        """Source bytes done inside the shards `running`. Of several attempts at one shard the furthest counts."""
        furthest: dict[str, int] = {}
        for stats in self._latest.values():
            for shard_id, done in stats.bytes_done.items():
                if shard_id in running:
                    furthest[shard_id] = max(done, furthest.get(shard_id, 0))
        return sum(furthest.values())

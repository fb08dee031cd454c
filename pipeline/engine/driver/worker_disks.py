"""Workers whose local disk fails or is full: how long each rests, and which failures count against a shard. No clock, no I/O.

Takes attempts that ended with a `StorageUnavailable` about a temporary file, and successes. A full disk fails every shard at once, so its
worker would always be the least busy one and take all shards; it rests for growing times instead. A failure counts against its shard only
where the shard may be too large for any disk: it failed on `ENOUGH` workers (or all), on this one before, and no other shard failed on this
one since the worker's last success.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ENOUGH = 3
REST_S, LONGEST_REST_S = 1.0, 60.0  # 1, 4, 16, 60 s after failures in a row


class WorkerDisks:
    """`now` is any clock that only grows, in seconds."""

    def __init__(self) -> None:
        self._row: dict[str, list[str]] = {}  # worker -> shards that failed there since its last success
        self._failed: dict[str, set[str]] = {}  # shard -> workers
        self._resting: dict[str, float] = {}  # worker -> until when
        self._ends: list[tuple[float, str]] = []  # heap of the same
        self.since: float | None = None  # the first failure since the last success of any worker

    def failed(self, worker: str, shard_id: str, now: float, *, workers: int) -> bool:
        """An attempt failed; its worker, one of `workers`, rests. True if the failure counts against the shard."""
        row = self._row.setdefault(worker, [])
        row.append(shard_id)
        failed_on = self._failed.setdefault(shard_id, set())
        counts = set(row) == {shard_id} and worker in failed_on and len(failed_on) >= min(ENOUGH, workers)
        failed_on.add(worker)
        self.since = now if self.since is None else self.since
        # Attempts that fail together are one failure: they do not extend a rest.
        if worker not in self._resting:
            self._resting[worker] = now + min(LONGEST_REST_S, REST_S * 4.0 ** min(len(row) - 1, 9))
            heapq.heappush(self._ends, (self._resting[worker], worker))
        return counts

    def succeeded(self, worker: str) -> None:
        """A shard was committed."""
        self._row.pop(worker, None)
        self.since = None

    def failing(self, workers: Iterable[str]) -> bool:
        """Whether the last attempt on every one of these workers failed."""
        return self.since is not None and all(worker in self._row for worker in workers)

    def rests(self, worker: str) -> bool:
        """Whether the worker rests and gets no shard."""
        return worker in self._resting

    def rested(self, now: float) -> list[str]:
        """Workers whose rest has ended since the last call."""
        over = []
        while self._ends and self._ends[0][0] <= now:
            until, worker = heapq.heappop(self._ends)
            if self._resting.get(worker) == until:
                del self._resting[worker]
                over.append(worker)
        return over

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._row.pop(worker, None)
        self._resting.pop(worker, None)

"""Numbers of one encode loop: seconds by what it waited for, bytes of its attempts, and everything as it is now for the driver.

Takes attempts and the feed where they are needed; keeps only numbers. `stats` is changed by the loop's thread alone.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.storage import retries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.engine.decoders.feed import Feed
    from pipeline.engine.worker.attempt import ShardAttempt


class LoopCounts:
    """See the module. `now` may be called from any thread."""

    def __init__(self) -> None:
        self.stats = WorkerStats()  # without what is counted elsewhere, which `now` fills in
        self._guard = threading.Lock()  # of the next two
        self._attempts: list[ShardAttempt] = []
        self._bytes_before = (0, 0)  # received and sent by attempts that have ended

    def begun(self, attempt: ShardAttempt) -> None:
        """An attempt is in flight."""
        with self._guard:
            self._attempts.append(attempt)

    def ended(self, attempt: ShardAttempt) -> None:
        """An attempt is no longer in flight."""
        with self._guard:
            self._attempts.remove(attempt)
            received, sent = self._bytes_before
            self._bytes_before = received + attempt.bytes_in, sent + attempt.bytes_out

    def now(self, progress: int, device_bytes: int, compile_s: float) -> WorkerStats:
        """The numbers as they are now."""
        with self._guard:
            attempts, (received, sent) = list(self._attempts), self._bytes_before
            received += sum(attempt.bytes_in for attempt in attempts)
            sent += sum(attempt.bytes_out for attempt in attempts)
        return replace(
            self.stats,
            progress=progress,
            bytes_done={attempt.shard_id: attempt.bytes_done for attempt in attempts},
            bytes_in=received,
            bytes_out=sent,
            storage_retries=retries(),
            device_bytes=device_bytes,
            compile_s=compile_s,
        )

    def waited(self, seconds: float, attempts: Sequence[ShardAttempt], feed: Feed) -> None:
        """The loop had no chunk to encode. The wait is charged to the oldest attempt."""
        if not attempts:
            self.stats.idle_s += seconds
            return
        attempt = attempts[0]
        if attempt.waiting_for_fetch and not feed.decoding:
            attempt.fetch_wait_s += seconds
            self.stats.fetch_wait_s += seconds
        elif feed.decoding:
            attempt.decode_wait_s += seconds
            self.stats.decode_wait_s += seconds
        elif not feed.ready_lanes:  # all decoders are starting
            self.stats.decode_wait_s += seconds
        else:
            self.stats.upload_wait_s += seconds

"""Who gets which shard: pure decisions on plain values, each with its reason. No Ray, no clock, no I/O.

Enters: the shards to do and what happened to workers. Leaves: assignments, retries, speculative copies, a verdict per shard.
Shards go out longest first; each worker holds up to `credit` of them; when none is left to hand out, the slowest running ones are
copied to idle workers (safe: the receipt fence lets only one copy win). A shard is given up after `attempts` failures of its own;
losing a preempted worker is nobody's fault and is not counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from pipeline.errors import FatalError, SourceChanged, TransientError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import Counts, Shard

SPECULATE_AGE = 2.0  # times the median duration before a running shard is copied
MIN_EVIDENCE = 100  # samples seen before the reject budget may stop a running build


@dataclass(slots=True)
class _Progress:
    shard: Shard
    shard_id: str
    failures: int = 0
    running: dict[str, float] = field(default_factory=dict)  # worker -> start time
    done: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """Give `shard` to `worker`."""

    worker: str
    shard: Shard
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a shard after a failure."""

    retry: bool
    reason: str


class Dispatcher:
    """The state of a build's shards."""

    def __init__(self, shards: Iterable[tuple[str, Shard]], *, credit: int, attempts: int) -> None:
        ordered = sorted(shards, key=lambda item: (-item[1].num_bytes, item[1].name))
        self._shards = {shard_id: _Progress(shard, shard_id) for shard_id, shard in ordered}
        self._pending = deque(self._shards)
        self._workers: dict[str, set[str]] = {}
        self._credit = credit
        self._attempts = attempts
        self._durations: list[float] = []
        # Kept as counts: a build may have 100,000 shards, and these are asked for on every event.
        self._running: set[str] = set()
        self._open = len(self._shards)
        self.open_bytes = sum(progress.shard.num_bytes for progress in self._shards.values())
        self.given_up: dict[str, str] = {}
        self.draining = False

    @property
    def finished(self) -> bool:
        """Nothing left to hand out and nothing running (or, draining, nothing running)."""
        return not self._running and (self.draining or not self._pending)

    @property
    def open_shards(self) -> int:
        """Shards neither done nor given up."""
        return self._open

    def workers_wanted(self, most: int) -> int:
        """Workers this build can keep busy."""
        return min(most, self._open)

    def add_worker(self, worker: str) -> None:
        """A worker is ready for shards."""
        self._workers.setdefault(worker, set())

    def assignments(self, now: float) -> list[Assignment]:
        """What to hand out now; taken as done. Workers with the least to do are served first."""
        given = []
        while self._pending and not self.draining:
            worker = self._least_busy()
            if worker is None:
                break
            shard_id = self._pending.popleft()
            given.append(self._give(worker, shard_id, now, "next longest shard"))
        if not self._pending and not self.draining:
            given += self._speculate(now)
        return given

    def on_done(self, worker: str, shard_id: str, now: float) -> bool:
        """A shard is committed. False if it was known already (the slower of two copies)."""
        progress = self._shards[shard_id]
        started = self._stop_running(progress, worker)
        if started is not None:
            self._durations.append(now - started)
        if progress.done:
            return False
        progress.done = True
        # A copy that still runs is no longer waited for.
        self._running.discard(shard_id)
        if self.given_up.pop(shard_id, None) is None:
            self._close(progress)
        return True

    def on_failed(self, worker: str, shard_id: str, error: BaseException) -> Verdict:
        """An attempt ended in `error`."""
        progress = self._shards[shard_id]
        self._stop_running(progress, worker)
        if progress.done:
            return Verdict(False, "another copy is committed")
        progress.failures += 1
        if progress.running:
            return Verdict(False, "another copy is still running")
        if isinstance(error, SourceChanged):
            return self._give_up(progress, f"{error}; run again to encode what is there now")
        if isinstance(error, FatalError) and not isinstance(error, TransientError):
            return self._give_up(progress, str(error))
        if progress.failures >= self._attempts:
            return self._give_up(progress, f"failed {progress.failures} times, last: {type(error).__name__}: {error}")
        self._pending.append(shard_id)
        return Verdict(True, f"attempt {progress.failures} of {self._attempts} failed: {type(error).__name__}: {error}")

    def on_lost(self, worker: str, error: BaseException, *, preempted: bool) -> list[tuple[str, Verdict]]:
        """A worker is gone; everything it held goes back."""
        verdicts = []
        for shard_id in sorted(self._workers.pop(worker, set())):
            if preempted:
                progress = self._shards[shard_id]
                self._stop_running(progress, worker)
                if not progress.done and not progress.running:
                    self._pending.appendleft(shard_id)
                    verdicts.append((shard_id, Verdict(True, "its node was preempted")))
            else:
                verdicts.append((shard_id, self.on_failed(worker, shard_id, error)))
        return verdicts

    def _least_busy(self) -> str | None:
        # A worker's second shard only waits in its hands: as long as somebody has none, they come first.
        free = [(len(held), worker) for worker, held in self._workers.items() if len(held) < self._credit]
        return min(free)[1] if free else None

    def _give(self, worker: str, shard_id: str, now: float, reason: str) -> Assignment:
        self._workers[worker].add(shard_id)
        self._shards[shard_id].running[worker] = now
        self._running.add(shard_id)
        return Assignment(worker, self._shards[shard_id].shard, reason)

    def _speculate(self, now: float) -> list[Assignment]:
        if not self._durations:
            return []
        limit = SPECULATE_AGE * median(self._durations)
        idle = [worker for worker, held in self._workers.items() if not held]
        if not idle:
            return []
        alone = [self._shards[i] for i in sorted(self._running) if len(self._shards[i].running) == 1]
        started = [(min(progress.running.values()), progress) for progress in alone]
        slow = sorted((item for item in started if now - item[0] > limit), key=lambda item: item[0])
        return [
            self._give(worker, progress.shard_id, now, f"copy of a shard that runs for {now - begun:.0f} s")
            for worker, (begun, progress) in zip(idle, slow, strict=False)
        ]

    def _stop_running(self, progress: _Progress, worker: str) -> float | None:
        started = progress.running.pop(worker, None)
        self._workers.get(worker, set()).discard(progress.shard_id)
        if not progress.running:
            self._running.discard(progress.shard_id)
        return started

    def _close(self, progress: _Progress) -> None:
        self._open -= 1
        self.open_bytes -= progress.shard.num_bytes

    def _give_up(self, progress: _Progress, reason: str) -> Verdict:
        self._close(progress)
        self.given_up[progress.shard_id] = reason
        return Verdict(False, reason)


def budget_exceeded(counts: Counts, budget: float, *, final: bool) -> str | None:
    """Why the build must stop for too much damaged input, or None.

    One damaged sample alone is never a flood (unless the budget is 0). While the build runs, a verdict needs `MIN_EVIDENCE` samples.
    """
    tolerated = budget * counts.samples if final else budget * max(counts.samples, MIN_EVIDENCE)
    if counts.damaged <= max(tolerated, 1 if budget > 0 else 0):
        return None
    share = counts.damaged / max(1, counts.samples)
    return (
        f"{counts.damaged} of {counts.samples} samples are damaged ({share:.1%}), more than reject_budget={budget:.1%}; "
        "see the rejects by reason, mend the input or raise reject_budget"
    )

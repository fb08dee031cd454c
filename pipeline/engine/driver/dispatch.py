"""Decides which worker gets which shard, and what follows a failure. Works on plain values: no Ray, no clock, no I/O.

Takes the shards to do and the events of workers and attempts, each with its time. Gives assignments, and a `Verdict` with its reason for
every failure. The largest shards are handed out first; a worker holds up to `credit`. When none is left, the slowest that run are copied to
idle workers, which is safe: the first receipt wins.

A shard is given up after `attempts` failures of its own. When a worker dies without an explanation, the shards it held become suspects. A
suspect runs alone on a worker, and waits for one on another node if there is one; a death counts only for a shard that was alone on its
worker. A preempted worker counts for no shard; a node that died, or a worker that was killed from outside, for no shard up to `EXCUSED`
times each. Videos that end workers are dropped before their shard is given up, see `BlamedVideos`. Shards whose storage failed wait behind
those that have not failed. Every call costs O(log shards), or O(shards that run) while `canaries_only` or a suspect waits.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline.engine.driver.blamed_videos import BlamedVideos
from pipeline.engine.driver.draining import finishes_in_time
from pipeline.engine.driver.running_median import RunningMedian
from pipeline.engine.driver.worker_loads import WorkerLoads
from pipeline.errors import FatalError, SourceChanged, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence, Set

    from pipeline.engine.worker.blamed_video import BlamedVideo, StepVideo
    from pipeline.records import Shard

SPECULATE_AGE = 2.0  # times the median duration before a running shard is copied
EXCUSED = 5  # deaths of nodes and kills from outside that do not count for a shard; beyond, it may be their cause
LATE_AT_ONCE = 32  # slow shards that one call looks at when the idle workers are all on their nodes
CANARIES = 2  # shards tried at once while it is not known whether the store fails or single objects
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a shard whose storage failed is handed out again: 1, 4, 16, 60 s

Cause = Literal["unexplained", "killed", "node", "preempted"]
EXCUSES = {"killed": "it was killed from outside; not counted", "node": "its node died; not counted"}


@dataclass(slots=True)
class _Progress:
    shard: Shard
    shard_id: str
    failures: int = 0
    excused: int = 0
    suspect: bool = False  # until it is done: it may be the cause of a worker's death
    running: dict[str, float] = field(default_factory=dict)  # worker -> start time
    # nodes of workers that were lost with it; a set of its own would take 216 bytes
    lost_on: frozenset[str] = frozenset()
    done: bool = False
    storage_failed: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """Give `shard` to `worker`."""

    worker: str
    shard: Shard
    reason: str
    blamed: tuple[BlamedVideo, ...] = ()  # of this shard


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision about a shard after a failure."""

    retry: bool
    reason: str


class Dispatcher:
    """State of a build's shards. `now` is any clock that only grows, in seconds."""

    def __init__(self, shards: Iterable[tuple[str, Shard]], *, credit: int, attempts: int) -> None:
        ordered = sorted(shards, key=lambda item: (-item[1].num_bytes, item[1].name))
        self._shards = {shard_id: _Progress(shard, shard_id) for shard_id, shard in ordered}
        self._pending = deque(self._shards)
        self._again: deque[str] = deque()  # storage failed; handed out after `_pending`
        self._suspects: deque[str] = deque()  # each needs a worker without other shards
        self._delayed: list[tuple[float, str]] = []  # heap: not before, shard
        self._parked: set[str] = set()  # failed, and `judge` or `release` must follow
        self._workers = WorkerLoads(credit)
        self._attempts = attempts
        self._durations = RunningMedian()
        self._started: list[tuple[float, str, str]] = []  # heap of (start, shard, worker); entries may be out of date
        self._running: set[str] = set()
        self._videos = BlamedVideos()
        self._open = len(self._shards)
        self.open_bytes = sum(progress.shard.num_bytes for progress in self._shards.values())
        self.given_up: dict[str, str] = {}
        self.draining = False
        self.paused = False  # nothing is handed out for the time being
        self.canaries_only = False  # only a few shards, which have not failed

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing is left to hand out; while draining, whether nothing runs."""
        waiting = self._pending or self._again or self._suspects or self._delayed or self._parked
        return not self._running and (self.draining or not waiting)

    @property
    def open_shards(self) -> int:
        """Shards neither done nor given up."""
        return self._open

    @property
    def running(self) -> Set[str]:
        """Ids of shards that run and are not done."""
        return self._running

    @property
    def fresh(self) -> bool:
        """Whether some shard whose storage has not failed waits or runs."""
        self._drop_done(self._pending)
        return bool(self._pending or self._fresh_running())

    @property
    def disks_failing_since(self) -> float | None:
        """Since when the temporary folder of every worker fails; None if one works, or still runs a shard."""
        return self._workers.disks_failing_since if not self._running else None

    def workers_wanted(self, most: int) -> int:
        """Number of workers, up to `most`, that this build can keep busy."""
        return min(most, self._open)

    def add_shard(self, shard_id: str, shard: Shard) -> None:
        """Adds a shard: files that an attempt left of its group."""
        if shard_id not in self._shards:
            self._shards[shard_id] = _Progress(shard, shard_id)
            self._pending.append(shard_id)
            self._open += 1
            self.open_bytes += shard.num_bytes

    def add_worker(self, worker: str, node: str = "") -> None:
        """A worker on `node` is ready for shards."""
        self._workers.add(worker, node)

    def assignments(self, now: float) -> list[Assignment]:
        """Shards to hand out now, counted as handed out. Workers that hold the fewest are served first."""
        if self.draining or self.paused:
            return []
        while self._delayed and self._delayed[0][0] <= now:
            self._requeue(self._shards[heapq.heappop(self._delayed)[1]])
        self._workers.end_rests(now)
        if self.canaries_only:
            return self._give_canaries(now)
        given = self._give_suspects(now)
        for queue in (self._pending, self._again):
            while self._drop_done(queue) and (worker := self._workers.least_busy()) is not None:
                given.append(self._give(worker, queue.popleft(), now, "next longest shard"))
        return given if self._pending or self._again else given + self._speculate(now)

    def on_done(self, worker: str, shard_id: str, now: float) -> bool:
        """A shard is committed. False if another copy was committed before."""
        progress = self._shards[shard_id]
        started = self._stop_running(progress, worker)
        self._workers.disks.succeeded(worker)
        if started is not None:
            self._durations.add(now - started)
        if progress.done:
            return False
        progress.done = True
        # The build does not wait for a copy that still runs.
        self._running.discard(shard_id)
        if self.given_up.pop(shard_id, None) is None:
            self._close(progress)
        return True

    def on_failed(self, worker: str, shard_id: str, error: BaseException, now: float) -> Verdict:
        """An attempt ended in `error`, which counts."""
        progress = self._shards[shard_id]
        self._stop_running(progress, worker)
        return self._count(progress, error, now)

    def park(self, worker: str, shard_id: str) -> float | None:
        """An attempt failed and the cause is not known yet: `judge` or `release` must follow.

        Returns the start time of the attempt; None where nothing need follow: the shard is done, given up or still runs elsewhere.
        """
        progress = self._shards[shard_id]
        started = self._stop_running(progress, worker)
        if started is None or progress.done or progress.running or shard_id in self.given_up:
            return None
        progress.storage_failed = True
        self._parked.add(shard_id)
        return started

    def judge(self, shard_id: str, error: BaseException, now: float) -> Verdict:
        """The failure of a parked shard counts."""
        self._parked.discard(shard_id)
        return self._count(self._shards[shard_id], error, now)

    def release(self, shard_id: str) -> None:
        """The failure of a parked shard was not its own: it is handed out again, after those that have not failed."""
        self._parked.discard(shard_id)
        self._requeue(self._shards[shard_id])

    def on_disk_failed(self, worker: str, shard_id: str, error: BaseException, now: float) -> Verdict:
        """An attempt ended because the worker's temporary folder failed. The worker rests; see `WorkerDisks` for what counts."""
        progress = self._shards[shard_id]
        counts = self._workers.disk_failed(worker, shard_id, now)
        self._stop_running(progress, worker)
        progress.storage_failed = True
        if counts:
            return self._count(progress, error, now)
        if progress.done or progress.running or shard_id in self.given_up:
            return Verdict(False, "another copy is committed or runs")
        self._requeue(progress)
        return Verdict(True, f"{error}; not counted, the shard is tried again and the worker rests")

    def on_lost(
        self,
        worker: str,
        error: BaseException,
        now: float,
        *,
        cause: Cause = "unexplained",
        step: Sequence[StepVideo] = (),
    ) -> list[tuple[str, Verdict]]:
        """A worker is gone; `step`: the videos of the step that it ended in by its own work. Returns the verdicts on the shards it held
        that are not done.
        """
        held = self._workers.held(worker)
        verdicts = []
        node = self._workers.node(worker)
        self._videos.died(step, node, str(error))
        for shard_id in held:
            progress = self._shards[shard_id]
            self._stop_running(progress, worker)
            if progress.done or shard_id in self.given_up:
                continue
            progress.lost_on |= {node}
            if (dropped := self._videos.dropped_by(step, shard_id)) is not None:
                progress.suspect = True
                self._requeue(progress)
                verdicts.append(
                    (shard_id, Verdict(True, f"{error}; video {dropped} ended several workers and is rejected"))
                )
                continue
            verdicts.append((shard_id, self._lost(progress, error, now, cause, alone=len(held) == 1)))
        self._workers.remove(worker)
        return verdicts

    def on_draining(
        self, worker: str, left_s: float, now: float, share: Callable[[str], float]
    ) -> list[tuple[str, str]]:
        """The worker's node goes away in `left_s` seconds (inf: unknown); it gets no further shard. May be called again and again.

        Returns (shard, reason) of attempts to be ended now. `share`: how much of a shard the worker has done, 0 to 1.
        """
        self._workers.leave(worker)
        back = []
        for shard_id in self._workers.held(worker):
            elapsed_s = now - self._shards[shard_id].running[worker]
            if not finishes_in_time(elapsed_s, share(shard_id), self._durations.value, left_s):
                back.append((shard_id, f"handed back: its node goes away in {left_s:.0f} s"))
        return back

    def on_handed_back(self, worker: str, shard_id: str) -> None:
        """An attempt was ended because its node goes away. Nothing is counted."""
        progress = self._shards[shard_id]
        self._stop_running(progress, worker)
        if shard_id not in self.given_up:
            self._requeue(progress, first=True)

    def node_avoided(self, node: str) -> None:
        """The node gets no more encoders: workers that ended there say nothing about videos."""
        self._videos.forgive(node)

    # --- what a failure means -----------------------------------------------------------------------------------------

    def _lost(self, progress: _Progress, error: BaseException, now: float, cause: Cause, *, alone: bool) -> Verdict:
        progress.excused += cause in EXCUSES
        progress.suspect |= cause in ("killed", "unexplained")
        if cause == "preempted" or (cause in EXCUSES and progress.excused <= EXCUSED):
            self._requeue(progress, first=True)
            return Verdict(True, "its node was preempted" if cause == "preempted" else EXCUSES[cause])
        progress.suspect = True
        if alone:
            return self._count(progress, error, now)
        self._requeue(progress)
        return Verdict(True, f"{error}; it was not alone there, so it is tried again alone and nothing is counted")

    def _count(self, progress: _Progress, error: BaseException, now: float) -> Verdict:
        if progress.done:
            return Verdict(False, "another copy is committed")
        progress.failures += 1
        if progress.running:
            return Verdict(False, "another copy is still running")
        if isinstance(error, SourceChanged):
            return self._give_up(progress, f"{error}; run again to encode what is there now")
        if isinstance(error, FatalError):
            return self._give_up(progress, str(error))
        if progress.failures >= self._attempts:
            return self._give_up(progress, f"failed {progress.failures} times, last: {type(error).__name__}: {error}")
        pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 4 ** (progress.failures - 1))
        if isinstance(error, StorageUnavailable):
            heapq.heappush(self._delayed, (now + pause_s, progress.shard_id))
        else:
            self._requeue(progress)
        return Verdict(True, f"attempt {progress.failures} of {self._attempts} failed: {type(error).__name__}: {error}")

    def _requeue(self, progress: _Progress, *, first: bool = False) -> None:
        if progress.done or progress.running:
            return
        retried = self._again if progress.storage_failed else self._pending
        queue = self._suspects if progress.suspect else retried
        if first:
            queue.appendleft(progress.shard_id)
        else:
            queue.append(progress.shard_id)

    def _close(self, progress: _Progress) -> None:
        self._open -= 1
        self.open_bytes -= progress.shard.num_bytes

    def _give_up(self, progress: _Progress, reason: str) -> Verdict:
        self._close(progress)
        self.given_up[progress.shard_id] = reason
        return Verdict(False, reason)

    # --- handing out --------------------------------------------------------------------------------------------------

    def _drop_done(self, queue: deque[str]) -> bool:
        """Drops finished shards at both ends. Whether any shard is left."""
        while queue and self._shards[queue[0]].done:
            queue.popleft()
        while queue and self._shards[queue[-1]].done:
            queue.pop()
        return bool(queue)

    def _fresh_running(self) -> int:
        return sum(not self._shards[shard_id].storage_failed for shard_id in self._running)

    def _give_canaries(self, now: float) -> list[Assignment]:
        """The smallest shards, which end first."""
        given: list[Assignment] = []
        while self._drop_done(self._pending) and self._fresh_running() < CANARIES:
            if (worker := self._workers.least_busy()) is None:
                break
            given.append(self._give(worker, self._pending.pop(), now, "canary: other shards' storage fails"))
        return given

    def _give_suspects(self, now: float) -> list[Assignment]:
        given = []
        while self._suspects:
            if self._shards[self._suspects[0]].done:
                self._suspects.popleft()
                continue
            lost_on = self._shards[self._suspects[0]].lost_on
            if (worker := self._workers.idle_for_suspect(lost_on)) is None:
                break
            given.append(self._give(worker, self._suspects.popleft(), now, "alone: a worker died that held it"))
            self._workers.close(worker)
        if self._suspects:
            self._workers.reserve(len(self._suspects), self._shards[self._suspects[0]].lost_on)
        return given

    def _give(self, worker: str, shard_id: str, now: float, reason: str) -> Assignment:
        self._workers.give(worker, shard_id)
        self._shards[shard_id].running[worker] = now
        self._running.add(shard_id)
        heapq.heappush(self._started, (now, shard_id, worker))
        return Assignment(worker, self._shards[shard_id].shard, reason, self._videos.of(shard_id))

    def _speculate(self, now: float) -> list[Assignment]:
        """Copies of the slowest shards, each on another node: what slows a shard is often its node."""
        given: list[Assignment] = []
        kept: list[tuple[float, str, str]] = []
        while self._durations.value is not None and self._started and len(kept) < LATE_AT_ONCE and self._workers.idle():
            begun, shard_id, worker = self._started[0]
            if now - begun <= SPECULATE_AGE * self._durations.value:
                break
            late = heapq.heappop(self._started)
            progress = self._shards[shard_id]
            if progress.running != {worker: begun} or progress.done or progress.suspect:  # it may end a second worker
                continue
            if (idle := self._workers.idle_elsewhere({self._workers.node(worker)})) is None:
                kept.append(late)
            else:
                given.append(self._give(idle, shard_id, now, f"copy of a shard that runs for {now - begun:.0f} s"))
        for late in kept:
            heapq.heappush(self._started, late)
        return given

    def _stop_running(self, progress: _Progress, worker: str) -> float | None:
        started = progress.running.pop(worker, None)
        self._workers.take(worker, progress.shard_id)
        if not progress.running:
            progress.running.clear()  # a dict that was emptied key by key keeps its table, 160 bytes
            self._running.discard(progress.shard_id)
        for other, begun in progress.running.items():  # may be copied again
            heapq.heappush(self._started, (begun, progress.shard_id, other))
        while (top := self._started[:1]) and self._shards[top[0][1]].running.get(top[0][2]) != top[0][0]:
            heapq.heappop(self._started)
        return started

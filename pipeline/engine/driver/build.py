"""One run over the shards to do: hands them to the worker pool, handles its events, shows progress, drains on signals.

Takes shards, a context and an `Executor`. Fills a `BuildReport`; an exception that ends the build has it as its attribute `report`. Nothing
here waits for a store: probes and heartbeats have threads of their own.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.engine.driver.budget import Spent, Unlimited, UpTime
from pipeline.engine.driver.dispatch import Dispatcher
from pipeline.engine.driver.live_counts import LiveCounts
from pipeline.engine.driver.observer import BuildObserver
from pipeline.engine.driver.outage import OutageWatch
from pipeline.engine.driver.progress import BuildProgress, Display, Repeats
from pipeline.engine.driver.reject_budget import budget_exceeded
from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import (
    NodeAvoided,
    Notice,
    PoolEvent,
    Pulse,
    ShardEnded,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from pipeline.errors import (
    BuildError,
    FatalError,
    HandedBack,
    Interrupted,
    LatheError,
    RejectBudgetExceeded,
    SourceChanged,
    SourceRefused,
    StorageUnavailable,
)
from pipeline.process import signals
from pipeline.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.driver.budget import Control
    from pipeline.engine.driver.dispatch import Verdict
    from pipeline.engine.driver.executor import Executor
    from pipeline.engine.driver.report import BuildReport
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import Shard, SourceObject
    from pipeline.storage import Store

SHOW_S = 0.2  # between updates of the display, which read the counts of every worker
SHOW_WORKER_S = 0.001  # for each worker, if that is more: the share of a core does not grow with them
POLL_S = 0.5


class Build:
    """See the module. `begun` is the time.monotonic() at which the whole build began. `with_rows` adds rows of tables to a shard."""

    def __init__(
        self,
        todo: list[Shard],
        context: BuildContext,
        executor: Executor,
        store: Store,
        display: Display,
        report: BuildReport,
        begun: float,
        control: Control | None = None,
        with_rows: Callable[[Shard], Shard] = lambda shard: shard,
    ) -> None:
        self._with_rows = with_rows
        self._job = job = context.job
        self._fingerprint = context.fingerprint
        self._by_id = {shard.id(context.fingerprint): shard for shard in todo}
        self._dispatcher = Dispatcher(self._by_id.items(), credit=job.engine.credit, attempts=job.engine.attempts)
        self._bytes_total = self._dispatcher.open_bytes
        self._pool = executor.pool(context)
        self._display = display
        self._repeats = Repeats(display)
        self._report = report
        self._begun = begun
        self._observer = BuildObserver(store, context, report, executor.meters())
        self._control = control or Unlimited()
        self._up_time = UpTime()
        self._watch = OutageWatch(store, lambda root: open_store(root, job.storage), job.engine.outage_s)
        self._live = LiveCounts()
        self._workers: set[str] = set()
        self._signalled = False
        self._disk_error: StorageUnavailable | None = None  # the latest
        self._show_at = 0.0

    def run(self) -> None:
        """Runs until every shard is done or given up, or the build must stop.

        Raises:
            Interrupted: a signal came; running shards were finished, and others are left.
            LatheError: the build had to stop.
        """
        self._report.encoders = self._dispatcher.workers_wanted(self._pool.size)
        try:
            with signals.deferred():
                try:
                    self._loop()
                finally:
                    self._end()
            self._settle_signal()
        except LatheError as error:
            error.report = self._report  # type: ignore[attr-defined]
            raise
        except KeyboardInterrupt as error:
            stop: BaseException = error if not signals.requested() else self._interrupted()
            stop.report = self._report  # type: ignore[attr-defined]
            raise stop from None

    def _loop(self) -> None:
        self._observer.started(len(self._by_id), self._bytes_total)
        self._drain_if_asked()
        if not self._dispatcher.draining:
            self._pool.start(self._report.encoders)
        while not self._dispatcher.finished:
            self._drain_if_asked()
            for assignment in self._dispatcher.assignments(time.monotonic()):
                self._observer.assigned(assignment)
                self._pool.assign(assignment.worker, self._with_rows(assignment.shard), assignment.blamed)
            for event in self._events():
                self._handle(event)
            self._look_at_stores()
            self._check_budgets()
            self._show()

    def _events(self) -> list[PoolEvent]:
        try:
            return self._pool.poll(POLL_S)
        except FatalError as error:
            raise (_as_build_error(error) if self._report.startup_s else error) from error.__cause__

    def _end(self) -> None:
        try:
            self._pool.close()
        finally:
            self._repeats.flush()
            self._report.wall_s = time.monotonic() - self._begun
            self._report.compile_s = self._live.compile_s()
            self._report.encoder_s = self._up_time.seconds(time.monotonic())
            for shard_id, why in self._dispatcher.given_up.items():
                shard = self._by_id[shard_id]  # names of shards in different folders may be the same
                name = (
                    shard.name if shard.name not in self._report.failed else f"{shard.name} of {shard.objects[0].uri}"
                )
                self._report.failed[name] = why
            dispatcher = self._dispatcher
            self._observer.close(sys.exception(), dispatcher.open_shards, draining=dispatcher.draining)

    def _drain_if_asked(self) -> None:
        if signals.requested() and not self._signalled:  # also where a limit has stopped the build before
            self._signalled = self._dispatcher.draining = True
            self._observer.draining("a signal")
            self._display.notice(
                "stopping: running shards are finished, the rest is left; send the signal again to stop at once"
            )

    def _settle_signal(self) -> None:
        if not self._dispatcher.open_shards:
            self._report.stopped = None  # what ran when the limit was reached was all there was
        if signals.requested() and self._dispatcher.draining and self._dispatcher.open_shards:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped: {self._dispatcher.open_shards} shards to do; the same command resumes")

    # --- events -------------------------------------------------------------------------------------------------------

    def _handle(self, event: PoolEvent) -> None:
        if isinstance(event, ShardEnded):
            self._shard_ended(event)
        elif isinstance(event, WorkerUp):
            self._workers.add(event.worker)
            self._observer.worker_up(event.worker)
            self._up_time.add(event.worker, time.monotonic())
            self._report.startup_s = self._report.startup_s or time.monotonic() - self._begun
            self._dispatcher.add_worker(event.worker, event.node)
        elif isinstance(event, Notice):
            self._display.notice(event.text)
            self._observer.notice(event.text)
        elif isinstance(event, Pulse):
            self._live.pulse(event.worker, event.stats)
        elif isinstance(event, WorkerGone):
            self._workers.discard(event.worker)
            self._up_time.remove(event.worker, time.monotonic())
            self._live.remove(event.worker)
            self._observer.worker_gone(event)
            self._display.notice(str(event.error))
            lost = self._dispatcher.on_lost(
                event.worker, event.error, time.monotonic(), cause=event.cause, step=event.step
            )
            for shard_id, verdict in lost:
                self._judged(shard_id, verdict)
        elif isinstance(event, NodeAvoided):
            self._display.notice(event.text)
            self._observer.notice(event.text)
            self._dispatcher.node_avoided(event.node)
        elif isinstance(event, WorkerDraining):
            self._hand_back(event)

    def _hand_back(self, event: WorkerDraining) -> None:
        """The worker's node goes away: it ends the attempts that would not be done in time."""

        def share(shard_id: str) -> float:
            return self._live.bytes_of(event.worker, shard_id) / max(1, self._by_id[shard_id].num_bytes)

        back = self._dispatcher.on_draining(event.worker, event.left_s, time.monotonic(), share)
        for shard_id, reason in back:
            self._observer.handed_back(event.worker, self._by_id[shard_id], shard_id, reason)
            self._notice(shard_id, reason)
        if back:
            self._pool.hand_back(event.worker, [shard_id for shard_id, _ in back])

    def _shard_ended(self, event: ShardEnded) -> None:
        now, outcome = time.monotonic(), event.outcome
        self._live.ended(event.worker, outcome.shard_id)
        self._observer.attempt_ended(event.worker, outcome.shard_id)
        if not isinstance(outcome, ShardFailure):
            self._watch.succeeded()
            if self._dispatcher.on_done(event.worker, outcome.shard_id, now):
                self._report.add(outcome, ours=outcome.ours)
                self._observer.done(event.worker, self._by_id[outcome.shard_id], outcome)
                for text in outcome.notes:
                    self._notice(outcome.shard_id, text)
                for objects in ((outcome.left,) if outcome.left else ()) + tuple((source,) for source in outcome.aside):
                    self._add_left(self._by_id[outcome.shard_id], objects)
            return
        error = outcome.error
        if isinstance(error, HandedBack):
            self._dispatcher.on_handed_back(event.worker, outcome.shard_id)
            return
        if isinstance(error, FatalError) and not isinstance(error, (SourceChanged, SourceRefused)):
            raise _as_build_error(error)
        if isinstance(error, StorageUnavailable) and error.uri is None:  # it concerns a temporary file of the worker
            self._disk_error = error
            verdict = self._dispatcher.on_disk_failed(event.worker, outcome.shard_id, error, now)
            self._judged(outcome.shard_id, verdict)
            return
        if isinstance(error, StorageUnavailable):
            started = self._dispatcher.park(event.worker, outcome.shard_id)
            if started is not None:
                self._watch.failed(outcome.shard_id, error, started, now)
            return
        self._judged(outcome.shard_id, self._dispatcher.on_failed(event.worker, outcome.shard_id, error, now))

    def _add_left(self, shard: Shard, left: tuple[SourceObject, ...]) -> None:
        """Adds a shard: files that an attempt left because its group had become too long, or a file whose reading failed."""
        rest = replace(shard, objects=left)
        shard_id = rest.id(self._fingerprint)
        self._by_id[shard_id] = rest
        self._dispatcher.add_shard(shard_id, rest)
        self._report.shards_total += 1

    def _look_at_stores(self) -> None:
        now = time.monotonic()
        rulings, notices = self._watch.poll(now, fresh=lambda: self._dispatcher.fresh)
        self._dispatcher.paused = self._watch.paused
        self._dispatcher.canaries_only = self._watch.doubtful
        self._observer.waiting(self._watch.paused, now)
        for text in notices:
            self._display.notice(text)
            self._observer.notice(text)
        for ruling in rulings:
            if ruling.counts:
                self._judged(ruling.shard_id, self._dispatcher.judge(ruling.shard_id, ruling.error, now))
            else:
                self._dispatcher.release(ruling.shard_id)
        since = self._dispatcher.disks_failing_since
        if since is not None and now - since > self._job.engine.outage_s:
            raise BuildError(
                f"the temporary folder of every encoder has failed for longer than engine.outage_s={self._job.engine.outage_s:g}: "
                f"{self._disk_error}; repair it, and the same command resumes"
            )

    def _judged(self, shard_id: str, verdict: Verdict) -> None:
        given_up = shard_id in self._dispatcher.given_up
        self._observer.failed(self._by_id[shard_id], shard_id, verdict, given_up=given_up)
        self._notice(shard_id, verdict.reason)

    def _notice(self, shard_id: str, reason: str) -> None:
        self._repeats.notice(self._by_id[shard_id].name, reason)

    def _check_budgets(self) -> None:
        self._control.check()
        now = time.monotonic()
        spent = Spent(now - self._begun, self._report.shards_done, self._up_time.seconds(now))
        if not self._dispatcher.draining and (reason := self._control.budget.exhausted(spent)) is not None:
            self._dispatcher.draining = True
            if self._dispatcher.open_shards:
                self._report.stopped = reason
                self._observer.draining(reason)
                self._display.notice(f"stopping, {reason}: running shards are finished, the rest is left")
        over = budget_exceeded(self._report.judged, self._job.reject_budget, final=False)
        if over is not None:
            raise RejectBudgetExceeded(over)

    # --- progress -----------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        now = time.monotonic()
        if now < self._show_at:
            return
        self._show_at = now + max(SHOW_S, SHOW_WORKER_S * len(self._workers))
        progress = self._now()
        self._display.update(progress)
        self._repeats.flush(older_than_s=10.0)
        if (failure := self._observer.show(progress, self._live, self._dispatcher.open_shards)) is not None:
            self._display.notice(failure)

    def _now(self) -> BuildProgress:
        report, total = self._report, self._bytes_total
        elapsed_s = time.monotonic() - self._begun
        encoding_s = max(0.0, elapsed_s - report.startup_s - self._live.compile_s()) if report.startup_s else 0.0
        done = total - self._dispatcher.open_bytes + self._live.bytes_inside(self._dispatcher.running)
        frames = max(self._live.frames, report.counts.frames)
        return BuildProgress(
            shards_total=report.shards_total,
            shards_done=report.shards_before + report.shards_done + report.shards_elsewhere,
            bytes_total=total,
            bytes_done=done,
            clips=max(self._live.clips, report.counts.clips),
            frames=frames,
            frames_per_s=frames / elapsed_s if elapsed_s else 0.0,
            samples=report.counts.samples,
            rejects=sum(report.rejects.values()),
            workers=len(self._workers),
            elapsed_s=elapsed_s,
            eta_s=encoding_s * (total - done) / done if done and self._dispatcher.open_shards else None,
        )


def _as_build_error(error: FatalError) -> FatalError:
    """Access that is lost during a build is a failed build (exit code 1), not a wrong command (2)."""
    return BuildError(f"{error}; repair it, and the same command resumes") if error.exit_code == 2 else error

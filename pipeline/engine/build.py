"""One run of the executor over the shards to do: hands them out, handles what the crew reports, shows progress, drains on signals.

In: shards, a blueprint, an `Executor`. Out: a filled `BuildReport`, or an exception with that report attached.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from pipeline.engine.crew import CrewEvent, Notice, Pulse, WorkerGone, WorkerUp
from pipeline.engine.dispatch import Dispatcher, budget_exceeded
from pipeline.engine.encode_loop import ShardFailure
from pipeline.errors import BuildError, FatalError, LatheError, RejectBudgetExceeded, SourceChanged
from pipeline.progress import Display, Snapshot

if TYPE_CHECKING:
    from pipeline.engine.blueprint import Blueprint
    from pipeline.engine.executor import Executor
    from pipeline.records import Shard
    from pipeline.report import BuildReport
    from pipeline.storage import Store

HEARTBEAT_S = 30.0


class Build:
    """One run of the executor over the shards to do."""

    def __init__(
        self,
        todo: list[Shard],
        blueprint: Blueprint,
        executor: Executor,
        store: Store,
        display: Display,
        report: BuildReport,
        begun: float,
    ) -> None:
        self._job = blueprint.job
        self._fingerprint = blueprint.fingerprint
        self._by_id = {shard.id(blueprint.fingerprint): shard for shard in todo}
        self._dispatcher = Dispatcher(
            self._by_id.items(), credit=self._job.engine.credit, attempts=self._job.engine.attempts
        )
        self._bytes_total = self._dispatcher.open_bytes
        self._crew = executor.crew(blueprint)
        self._store = store
        self._display = display
        self._report = report
        self._begun = begun
        self._pulses: dict[str, dict[str, Any]] = {}
        self._workers: set[str] = set()
        self._heartbeat_at = 0.0

    def run(self) -> None:
        """Until every shard is done or given up, or the build must stop."""
        self._report.encoders = self._dispatcher.workers_wanted(self._crew.size)
        try:
            with _drain_on_signal(self._dispatcher, self._display):
                self._crew.start(self._report.encoders)
                while not self._dispatcher.finished:
                    for assignment in self._dispatcher.assignments(time.monotonic()):
                        self._crew.assign(assignment.worker, assignment.shard)
                    for event in self._crew.poll(0.5):
                        self._handle(event)
                    self._stop_on_flood()
                    self._show()
        finally:
            self._crew.close()
            self._heartbeat(final=True)
        for shard_id, why in self._dispatcher.given_up.items():
            shard = self._by_id[shard_id]  # names of shards in different folders may be the same
            name = shard.name if shard.name not in self._report.failed else f"{shard.name} of {shard.objects[0].uri}"
            self._report.failed[name] = why

    def _handle(self, event: CrewEvent) -> None:
        if isinstance(event, WorkerUp):
            self._workers.add(event.worker)
            self._report.startup_s = self._report.startup_s or time.monotonic() - self._begun
            self._dispatcher.add_worker(event.worker)
        elif isinstance(event, Notice):
            self._display.notice(event.text)
        elif isinstance(event, Pulse):
            self._pulses[event.worker] = event.stats
        elif isinstance(event, WorkerGone):
            self._workers.discard(event.worker)
            self._display.notice(str(event.error))
            for shard_id, verdict in self._dispatcher.on_lost(event.worker, event.error, preempted=event.preempted):
                self._tell(shard_id, verdict.reason)
        elif isinstance(event.outcome, ShardFailure):
            error = event.outcome.error
            if isinstance(error, FatalError) and not isinstance(error, SourceChanged):
                raise self._stopped_by(error)
            verdict = self._dispatcher.on_failed(event.worker, event.outcome.shard_id, error)
            self._tell(event.outcome.shard_id, verdict.reason)
        elif self._dispatcher.on_done(event.worker, event.outcome.shard_id, time.monotonic()):
            self._report.add(event.outcome)

    def _stopped_by(self, error: FatalError) -> FatalError:
        """With what was done so far. Access lost in the middle of a build is a build that failed, not a wrong command."""
        self._report.wall_s = time.monotonic() - self._begun
        stop = BuildError(f"{error}; once that is mended, the same command resumes") if error.exit_code == 2 else error
        stop.report = self._report  # type: ignore[attr-defined]
        return stop

    def _tell(self, shard_id: str, reason: str) -> None:
        self._display.notice(f"{self._by_id[shard_id].name}: {reason}")

    def _stop_on_flood(self) -> None:
        over = budget_exceeded(self._report.counts, self._job.reject_budget, final=False)
        if over is not None:
            self._report.wall_s = time.monotonic() - self._begun
            error = RejectBudgetExceeded(over)
            error.report = self._report  # type: ignore[attr-defined]
            raise error

    def _show(self) -> None:
        self._display.update(self._snapshot())
        if time.monotonic() >= self._heartbeat_at:
            self._heartbeat(final=False)

    def _heartbeat(self, *, final: bool) -> None:
        """`progress.json` in the output, for `lathe status` elsewhere. Best effort is enough: the receipts are the truth."""
        self._heartbeat_at = time.monotonic() + HEARTBEAT_S
        snapshot = self._snapshot()
        values = {name: getattr(snapshot, name) for name in Snapshot.__slots__}
        state = {"running": not final, "updated": time.time(), "fingerprint": self._fingerprint, **values}
        try:
            self._store.write("progress.json", json.dumps(state, indent=1).encode())
        except LatheError as error:
            self._display.notice(f"progress.json could not be written: {error}")

    def _snapshot(self) -> Snapshot:
        report = self._report
        elapsed = time.monotonic() - self._begun
        total = self._bytes_total
        done = total - self._dispatcher.open_bytes
        frames = sum(int(pulse.get("frames", 0)) for pulse in self._pulses.values())
        clips = sum(int(pulse.get("clips", 0)) for pulse in self._pulses.values())
        eta = elapsed * (total - done) / done if done and self._dispatcher.open_shards else None
        return Snapshot(
            shards_total=report.shards_total,
            shards_done=report.shards_before + report.shards_done,
            bytes_total=total,
            bytes_done=done,
            clips=max(clips, report.counts.clips),
            frames=max(frames, report.counts.frames),
            frames_per_s=max(frames, report.counts.frames) / elapsed if elapsed else 0.0,
            samples=report.counts.samples,
            rejects=sum(report.rejects.values()),
            workers=len(self._workers),
            elapsed_s=elapsed,
            eta_s=eta,
        )


class _drain_on_signal:  # noqa: N801 - used as a statement
    """First SIGINT or SIGTERM: hand out nothing more, finish what runs. Second: stop now."""

    def __init__(self, dispatcher: Dispatcher, display: Display) -> None:
        self._dispatcher = dispatcher
        self._display = display
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        # Only the main thread may set handlers. Ray has set its own for SIGTERM by now; ours comes after.
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._dispatcher.draining:
            raise KeyboardInterrupt
        self._dispatcher.draining = True
        self._display.notice("stopping: shards that run are finished, the rest is left; once more to stop now")

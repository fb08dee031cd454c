"""What a build shows to others while it runs: its heartbeat, its run log, and its Prometheus series where it runs on Ray.

Takes the driver's events, one call each; never waits for a store. `heartbeat`, `run_log` and `engine/ray/metrics.py` say where they go.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.engine.driver.heartbeat import Heartbeat, build_name
from pipeline.engine.driver.run_log import RunLog
from pipeline.engine.driver.worker_activity import STARTING, describe
from pipeline.engine.worker.build_context import versions
from pipeline.storage import retries

if TYPE_CHECKING:
    from pipeline.engine.driver.dispatch import Assignment, Verdict
    from pipeline.engine.driver.live_counts import LiveCounts
    from pipeline.engine.driver.progress import BuildProgress
    from pipeline.engine.driver.report import BuildReport
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.pool import WorkerGone
    from pipeline.engine.worker.shard_result import ShardResult
    from pipeline.records import Counts, Shard, Timings
    from pipeline.storage import Store

SHOW_S = 5.0  # between descriptions of the workers, which cost time for each
INPUTS_LOGGED = 100
FAILURES_LOGGED = 1000  # of the report in the last line
LONGEST_REASON = 500  # characters


class Meters(Protocol):
    """Exporter of series: see `engine/ray/metrics.py`."""

    def record(self, values: dict[tuple[str, str], float]) -> None:
        """Takes the numbers now, by series and value of its label."""
        ...


class BuildObserver:
    """See the module. One thread calls it, the driver's. `meters`: None where nothing is exported (inline)."""

    def __init__(self, store: Store, context: BuildContext, report: BuildReport, meters: Meters | None) -> None:
        self._context = context
        self._report = report
        self._meters = meters
        self.build = build_name(context.build)
        self._heartbeat = Heartbeat(store, context.fingerprint, layout=context.layout, build=self.build)
        self._log = RunLog(store, self.build, layout=context.layout)
        self._held: dict[str, dict[str, tuple[str, float]]] = {}  # worker -> shard id -> name, when it was handed out
        self._outcomes: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._outage_s = 0.0
        self._drained_by: str | None = None
        self._paused_since: float | None = None
        self._show_at = 0.0
        self._encoders: dict[str, Any] = {}

    def started(self, shards: int, num_bytes: int) -> None:
        """The build begins with so many shards to do."""
        context, job, report = self._context, self._context.job, self._report
        self._log.event(
            "started",
            build=self.build,
            attempts=context.build,
            output=report.output,
            inputs=list(job.inputs[:INPUTS_LOGGED]),
            num_inputs=len(job.inputs),
            folder=os.getcwd(),
            job=job.model_dump(mode="json", exclude={"inputs", "output", "drill"}),
            fingerprint=report.fingerprint,
            network=report.network,
            device=report.device,
            versions=versions(),
            host=socket.gethostname(),
            pid=os.getpid(),
            shards=shards,
            shards_before=report.shards_before,
            bytes=num_bytes,
        )

    # --- events -------------------------------------------------------------------------------------------------------

    def worker_up(self, worker: str) -> None:
        """A worker can take shards."""
        self._held[worker] = {}
        self._log.event("worker_up", worker=worker)

    def worker_gone(self, event: WorkerGone) -> None:
        """A worker was lost, or did not come up."""
        self._held.pop(event.worker, None)
        self._lost[event.cause] += 1
        self._log.event("worker_gone", worker=event.worker, cause=event.cause, reason=_short(event.error))

    def assigned(self, assignment: Assignment) -> None:
        """A shard was handed out."""
        shard, shard_id = assignment.shard, assignment.shard.id(self._context.fingerprint)
        self._held.setdefault(assignment.worker, {})[shard_id] = shard.name, time.monotonic()
        self._log.event(
            "assigned",
            worker=assignment.worker,
            shard=shard.name,
            shard_id=shard_id,
            uri=shard.objects[0].uri,
            last_uri=shard.objects[-1].uri,
            objects=len(shard.objects),
            bytes=shard.num_bytes,
            reason=assignment.reason,
        )

    def attempt_ended(self, worker: str, shard_id: str) -> None:
        """The worker no longer holds the shard."""
        self._held.get(worker, {}).pop(shard_id, None)

    def done(self, worker: str, shard: Shard, result: ShardResult) -> None:
        """A shard is committed, by this build or another."""
        self._outcomes["done" if result.ours else "elsewhere"] += 1
        self._log.event(
            "done",
            worker=worker,
            shard=shard.name,
            shard_id=result.shard_id,
            ours=result.ours,
            counts=_not_zero(result.counts),
            rejects=result.rejects,
            files=result.files,
            bytes=result.num_bytes,
            timings=_not_zero(result.timings),
            refused=len(result.refused),
        )

    def failed(self, shard: Shard, shard_id: str, verdict: Verdict, *, given_up: bool) -> None:
        """An attempt at a shard failed, and what follows. A failure beside another copy of the shard is neither retried nor given up."""
        what = "given_up" if given_up else "retried" if verdict.retry else "copy_failed"
        self._outcomes.update({"given_up": ["abandoned"], "retried": ["retried"]}.get(what, []))
        self._log.event(what, shard=shard.name, shard_id=shard_id, reason=_short(verdict.reason))

    def handed_back(self, worker: str, shard: Shard, shard_id: str, reason: str) -> None:
        """The worker's node goes away before the shard would be done: another worker gets it. Repeated calls for one attempt count once."""
        if self._held.get(worker, {}).pop(shard_id, None) is None:
            return
        self._outcomes["handed_back"] += 1
        self._log.event("handed_back", worker=worker, shard=shard.name, shard_id=shard_id, reason=_short(reason))

    def notice(self, text: str) -> None:
        """A line for the user."""
        self._log.event("notice", text=_short(text))

    def draining(self, reason: str) -> None:
        """No further shard is handed out."""
        self._drained_by = reason
        self._log.event("draining", reason=reason)

    def waiting(self, paused: bool, now: float) -> None:
        """Whether the build waits for storage; called often. `now` is time.monotonic()."""
        if paused and self._paused_since is None:
            self._paused_since = now
            self._log.event("outage", state="began")
        elif not paused and self._paused_since is not None:
            lasted = now - self._paused_since
            self._outage_s += lasted
            self._paused_since = None
            self._log.event("outage", state="ended", seconds=round(lasted, 1))

    # --- state --------------------------------------------------------------------------------------------------------

    def show(self, progress: BuildProgress, live: LiveCounts, open_shards: int) -> str | None:
        """Offers the numbers for the heartbeat and exports them. Returns a failure of the heartbeat or the log to show, once each."""
        now = time.monotonic()
        if now >= self._show_at:
            self._show_at = now + SHOW_S
            self._describe(live, now)
            self._export(progress, open_shards, now)
        self._heartbeat.offer(
            {
                **asdict(progress),
                "waiting_for_storage": self._paused_since is not None,
                "encoders": self._encoders,
                "outcomes": dict(self._outcomes),
                "workers_lost": dict(self._lost),
                "rejects_by_reason": dict(self._report.rejects),  # another thread writes it
            }
        )
        return self._heartbeat.failure() or self._log.failure()

    def close(self, error: BaseException | None, open_shards: int, *, draining: bool) -> None:
        """Logs the end, removes the heartbeat. `error`: what ended the build early; None for the end of its work or of a drain."""
        report = self._report
        if isinstance(error, KeyboardInterrupt) or (error is None and draining and open_shards):
            outcome = "stopped"
        elif error is not None:
            outcome = "error"
        else:
            outcome = "shards_failed" if report.failed or report.refused else "done"
        values = report.to_dict()
        values["failed"] = dict(list(report.failed.items())[:FAILURES_LOGGED])
        values["refused"] = report.refused[:FAILURES_LOGGED]
        reason = self._drained_by if outcome == "stopped" else None
        if error is not None and not isinstance(error, KeyboardInterrupt):
            reason = _short(f"{type(error).__name__}: {error}")
        self._log.event("ended", outcome=outcome, reason=reason, open_shards=open_shards, report=values)
        self._log.close()
        self._heartbeat.close()

    def _describe(self, live: LiveCounts, now: float) -> None:
        found = live.activities()
        activities = {worker: found.get(worker, STARTING) for worker in self._held}
        held = {worker: dict(shards.values()) for worker, shards in self._held.items()}
        self._encoders = {
            **describe(activities, held, now=now, outage=self._paused_since is not None),
            "wanted": self._report.encoders,
            "frames_per_s": round(sum(item.frames_per_s for item in activities.values()), 2),
        }

    def _export(self, progress: BuildProgress, open_shards: int, now: float) -> None:
        if self._meters is None:
            return
        outage_s = self._outage_s + (0.0 if self._paused_since is None else now - self._paused_since)
        values: dict[tuple[str, str], float] = {
            ("lathe_committed_bytes_total", ""): self._report.num_bytes,
            ("lathe_outage_seconds_total", ""): outage_s,
            ("lathe_encoders", ""): progress.workers,
            ("lathe_shards_open", ""): open_shards,
            ("lathe_open_bytes", ""): progress.bytes_total - progress.bytes_done,
            ("lathe_storage_retries_total", ""): retries(),
        }
        values |= {("lathe_shards_total", outcome): n for outcome, n in self._outcomes.items()}
        values |= {("lathe_workers_lost_total", cause): n for cause, n in self._lost.items()}
        values |= {("lathe_rejects_total", reason): n for reason, n in self._report.rejects.items()}
        self._meters.record(values)


def _not_zero(values: Counts | Timings) -> dict[str, float]:
    """As `asdict`, which copies deeply and takes a quarter of the driver's time a shard."""
    return {name: n for name in values.__slots__ if (n := getattr(values, name))}


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"

"""The front door: `encode(job)` lists, subtracts what is done, hands out the rest, and answers with a `BuildReport`.

Enters: an `EncodeJob`. Leaves: receipts in the output, a report. The order of things: everything that can be wrong with the command is
found before anything is started; then the executor works; then the books are checked against the reject budget.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import encoder as encoder_room
from pipeline.clips import resolve_rules
from pipeline.corpus import group_files, resolve_inputs
from pipeline.engine.blueprint import Blueprint, draw
from pipeline.engine.crew import Crew, CrewEvent, InlineCrew, Notice, Pulse, WorkerGone, WorkerUp
from pipeline.engine.dispatch import Dispatcher, budget_exceeded
from pipeline.engine.encode_loop import ShardFailure
from pipeline.errors import (
    BuildError,
    ConfigError,
    FatalError,
    InputError,
    LatheError,
    RejectBudgetExceeded,
    ShardsFailed,
    SourceChanged,
)
from pipeline.groups import agreed_groups
from pipeline.progress import Display, Silent, Snapshot
from pipeline.receipts import Ledger
from pipeline.report import BuildReport
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.encoder import LatentSpec
    from pipeline.records import ClipRules, Shard, SourceObject

HEARTBEAT_S = 30.0


def encode(job: EncodeJob, display: Display | None = None) -> BuildReport:
    """Encodes what is not encoded yet. Running it again resumes; running it twice at once is safe.

    Raises:
        UsageError: something about the job is wrong; nothing was started.
        ShardsFailed: some shards could not be finished; the error's `report` attribute has the numbers.
        RejectBudgetExceeded: too many damaged inputs; likewise.
    """
    display = display or Silent()
    begun = time.monotonic()
    if (known := encoder_room.known_spec(job.model)) is not None:
        _rules(job, known)  # frame counts and sizes it cannot take are found before anything is touched
    store = open_store(job.output, job.storage)
    shards = _without_own_output(resolve_inputs(job.inputs, job.storage), store)
    if job.output.startswith("s3://"):
        store.preflight()  # says within seconds what is wrong, instead of after all retries
    store.check_writable()
    ledger = Ledger(store)
    notices = list(ledger.prepare("lathe"))
    # The network loads while Ray starts: both take seconds, and neither needs the other.
    with ThreadPoolExecutor(1, "identify") as pool, _Executor(job, pool) as crew_maker:
        device, dtype = crew_maker.resolve_device()
        notices += crew_maker.notices()
        network = crew_maker.network()
        blueprint = draw(job, _rules(job, network.spec), network, device, dtype)
        todo, done_before = _subtract_done(shards, store, ledger, blueprint)
        report = BuildReport(
            output=job.output,
            fingerprint=blueprint.fingerprint,
            network=network.spec.network,
            untrained=bool(network.identity["untrained"]),
            device=device,
            shards_total=len(todo) + done_before,
            shards_before=done_before,
            notices=notices,
        )
        notices += _weights_notices(job.model.checkpoint, network.spec.network, network.identity, network.provenance)
        for text in notices:
            display.notice(text)
        if todo:
            build = _Build(todo, blueprint, crew_maker, store, display, report, begun)
            build.run()
    report.wall_s = time.monotonic() - begun
    _judge(report, job)
    return report


def _weights_notices(
    checkpoint: str | None, name: str, identity: dict[str, Any], provenance: dict[str, Any]
) -> list[str]:
    """What is to be known of weights that are not somebody's training for production."""
    if identity["untrained"]:
        return ["UNTRAINED random weights: the latents will mean nothing; give --checkpoint for real ones"]
    if not str(provenance.get("uri", "")).startswith("embedded://"):
        return []
    asked = "no --checkpoint" if checkpoint is None else f"--checkpoint {checkpoint}"
    return [f"{asked}: the weights that come with Lathe ({name}); they are for demos and tests, not for production"]


def _without_own_output(shards: list[Shard], store: Store) -> list[Shard]:
    """The output may lie inside a folder of inputs; its tars of latents are no inputs of the run that resumes it.

    Raises:
        InputError: the inputs are nothing but these.
    """
    ours = store.uri("data") + "/"
    others = [shard for shard in shards if not all(source.uri.startswith(ours) for source in shard.objects)]
    if shards and not others:
        raise InputError(f"the inputs hold nothing but what was written to the output {store.root}; name the videos")
    return others


def _rules(job: EncodeJob, spec: LatentSpec) -> ClipRules:
    if job.write.moments and not spec.moments:
        raise ConfigError(
            f"write.moments: {spec.network} gives one latent and no log-variance; leave moments out to store the latent"
        )
    return resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)


def _judge(report: BuildReport, job: EncodeJob) -> None:
    """Raises what the finished build deserves, with the report attached."""
    error: LatheError | None = None
    over = budget_exceeded(report.counts, job.reject_budget, final=True)
    if report.failed:
        name, why = sorted(report.failed.items())[0]
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        error = ShardsFailed(f"{len(report.failed)} of {report.shards_total} shards failed; {name}: {why}{more}")
    elif over is not None:
        error = RejectBudgetExceeded(over)
    elif not report.ok:
        left = report.shards_total - report.shards_before - report.shards_done
        error = ShardsFailed(f"stopped with {left} shards to do; the same command resumes")
    if error is not None:
        error.report = report  # type: ignore[attr-defined]
        raise error


def _subtract_done(shards: list[Shard], store: Store, ledger: Ledger, blueprint: Blueprint) -> tuple[list[Shard], int]:
    """Shards without a receipt, and how many have one. Plain files are grouped as the output has it written down."""
    fingerprint = blueprint.fingerprint
    done = ledger.done()
    listed = [source for shard in shards if shard.kind == "files" for source in shard.objects]
    found = [shard for shard in shards if shard.kind == "tar"]
    if listed:
        per_shard = blueprint.job.storage.files_per_shard
        groups = agreed_groups(store, fingerprint, listed, lambda fresh: group_files(fresh, per_shard))
        found += [shard if shard.id(fingerprint) in done else _present(shard, set(listed)) for shard in groups]
    todo = [shard for shard in found if shard.id(fingerprint) not in done]
    return todo, len(found) - len(todo)


def _present(shard: Shard, listed: set[SourceObject]) -> Shard:
    """The shard without files that have gone since it was grouped."""
    return replace(shard, objects=tuple(source for source in shard.objects if source in listed))


class _Executor:
    """Connects to Ray when the job wants it, finds out what the network is meanwhile, and makes the crew."""

    def __init__(self, job: EncodeJob, pool: ThreadPoolExecutor) -> None:
        self._job = job
        self._cluster: Any = None
        self._loading = pool.submit(encoder_room.identify, job.model)

    def __enter__(self) -> _Executor:
        if self._job.engine.executor == "ray":
            from pipeline.engine import ray_session

            self._cluster = ray_session.connect(
                self._job.engine.address,
                cpus=_local_cpus(self._job),
                object_store_bytes=(self._job.engine.encoders or 1) * self._job.engine.frame_bytes * 5 // 4,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cluster is not None:
            from pipeline.engine import ray_session

            ray_session.disconnect()

    def network(self) -> encoder_room.Network:
        """What the job's model is; raises what its checkpoint deserves."""
        return self._loading.result()

    def resolve_device(self) -> tuple[str, str]:
        """Device and compute dtype of the encoders.

        Raises:
            ConfigError: CUDA was asked for, and no encoder can ever find it.
        """
        cluster, config = self._cluster, self._job.model
        cuda = cluster.gpus >= 1 if cluster is not None else encoder_room.cuda_available()
        device, dtype = encoder_room.resolve_device(config.device, config.compute_dtype, cuda=cuda)
        # A joined cluster may grow GPU nodes when encoders ask for them; this machine will not.
        if device.startswith("cuda") and not cuda and (cluster is None or cluster.local):
            raise ConfigError(
                f"model.device: {device} was asked for, and this machine has no CUDA device; use cpu or auto"
            )
        return device, dtype

    def notices(self) -> list[str]:
        """What to say about the cluster."""
        if self._cluster is None or self._cluster.local or self._cluster.gpus or self._job.model.device != "auto":
            return []
        return ["the cluster has no GPU at the moment, so encoders run on CPU; --device cuda would wait for GPUs"]

    def crew(self, blueprint: Blueprint) -> Crew:
        """The workers, not started."""
        if self._cluster is None:
            return InlineCrew(blueprint)
        from pipeline.engine.ray_crew import RayCrew

        return RayCrew(blueprint, self._cluster)


def _local_cpus(job: EncodeJob) -> float:
    """Logical CPUs a private Ray needs so that every actor of the job is placed at once."""
    import os

    cores = os.cpu_count() or 1
    encoders = job.engine.encoders or 8
    decoders = job.engine.decoders or cores
    return encoders * job.engine.encoder_cpus + max(cores, encoders * decoders) * job.engine.decoder_cpus


class _Build:
    """One run of the executor over the shards to do."""

    def __init__(
        self,
        todo: list[Shard],
        blueprint: Blueprint,
        executor: _Executor,
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

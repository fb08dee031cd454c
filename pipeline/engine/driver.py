"""The front door: `encode(job)` lists, subtracts what is done, hands out the rest, and answers with a `BuildReport`.

Enters: an `EncodeJob`. Leaves: receipts in the output, a report. The order of things: everything that can be wrong with the command is
found before anything is started; then the executor works; then the books are checked against the reject budget.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import encoder as encoder_room
from pipeline.clips import resolve_rules
from pipeline.corpus import group_files, resolve_inputs
from pipeline.engine.blueprint import Blueprint, draw
from pipeline.engine.build import Build
from pipeline.engine.dispatch import budget_exceeded
from pipeline.engine.executor import Executor
from pipeline.errors import (
    ConfigError,
    InputError,
    LatheError,
    RejectBudgetExceeded,
    ShardsFailed,
)
from pipeline.groups import agreed_groups
from pipeline.progress import Display, Silent
from pipeline.receipts import Ledger
from pipeline.report import BuildReport
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.encoder import LatentSpec
    from pipeline.records import ClipRules, Shard, SourceObject


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
    with ThreadPoolExecutor(1, "identify") as pool, Executor(job, pool) as crew_maker:
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
            build = Build(todo, blueprint, crew_maker, store, display, report, begun)
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
    elif report.refused:
        more = f" (and {len(report.refused) - 1} more)" if len(report.refused) > 1 else ""
        error = ShardsFailed(
            f"{len(report.refused)} inputs could not be read, the rest is committed; {report.refused[0]}{more}"
        )
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

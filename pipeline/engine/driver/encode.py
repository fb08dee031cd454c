"""Entry point `encode(job)`: lists the inputs, subtracts finished sources, runs the build, returns a `BuildReport`.

Errors in the command are found before anything is started. After the build its counts are checked against the reject budget.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import encoder as encoder
from pipeline.corpus import PassedOver, job_annotations
from pipeline.engine.driver.budget import BuildPlan, Unlimited
from pipeline.engine.driver.build import Build
from pipeline.engine.driver.compile_choice import choose_compile
from pipeline.engine.driver.coverage import Work, find_work, without_unchanged
from pipeline.engine.driver.executor import Executor
from pipeline.engine.driver.other_settings import other_settings_notices
from pipeline.engine.driver.progress import Display, Silent
from pipeline.engine.driver.reject_budget import budget_exceeded
from pipeline.engine.driver.report import BuildReport
from pipeline.engine.driver.retries import REASONS_SHOWN, retry_work
from pipeline.engine.driver.summary_keeper import SummaryKeeper
from pipeline.engine.driver.unchanged import find_unchanged, record_unchanged
from pipeline.engine.worker.build_context import BuildContext, make_context
from pipeline.errors import (
    BudgetSpent,
    ConfigError,
    InputError,
    LatheError,
    NothingEncoded,
    RejectBudgetExceeded,
    ShardsFailed,
)
from pipeline.format.card import data_card, hugging_face_config
from pipeline.format.codec import storage_name
from pipeline.format.layout import CARD_KEY, DATA, HUGGING_FACE_KEY, OWN_FOLDERS, OWN_OBJECTS
from pipeline.ledger.addresses import check_whole_output
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate.hugging_face import data_files
from pipeline.operate.listed_inputs import list_shards
from pipeline.storage import Store, is_remote, open_store
from pipeline.units import quantity
from pipeline.video.clips import resolve_rules
from pipeline.video.image_rules import with_images

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.corpus import Annotations
    from pipeline.encoder import LatentSpec
    from pipeline.engine.driver.budget import Control
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import ClipRules, Counts, Shard


def encode(job: EncodeJob, display: Display | None = None, control: Control | None = None) -> BuildReport:
    """Encodes the inputs that are not encoded yet. Running it again resumes; running it twice at once is safe. `control` may refuse or end
    it, and limits what it uses.

    Raises:
        UsageError: the job is wrong; nothing was started. With `strict`, also where inputs hold more than tars and videos.
        ShardsFailed: some shards could not be finished. Here and below the error's `report` attribute has the numbers.
        BudgetSpent: a limit of `control` was reached; running shards were finished.
        RejectBudgetExceeded: too many damaged inputs, over this run and the receipts of earlier ones.
        NothingEncoded: no clip was encoded, now or earlier, and the job does not allow that.
    """
    with job_annotations(job) as annotations:
        return _encode(job, display or Silent(), control or Unlimited(), annotations)


def _encode(job: EncodeJob, display: Display, control: Control, annotations: Annotations) -> BuildReport:
    begun = time.monotonic()
    if (known := encoder.known_spec(job.model)) is not None:
        _rules(job, known)  # reports frame counts and sizes it cannot take before anything is touched
    store = open_store(check_whole_output(job.output), job.storage)
    passed_over = PassedOver(own=_own_uris(store))
    shards = _without_own_output(list_shards(job, annotations, passed_over), store)
    if job.strict:
        passed_over.refuse()
    if is_remote(job.output):
        store.preflight()  # reports an error within seconds instead of after all retries
    store.check_writable()
    ledger = Ledger(store)
    notices = [*filter(None, [passed_over.line()]), *ledger.prepare("lathe")]
    with Executor(job) as executor:
        summaries = Summaries(store)
        receipts = summaries.all()
        if not receipts:  # everything is to do: Ray starts while the weights are read
            executor.connect()
        device, dtype = executor.resolve_device()
        network = executor.network()
        plain = make_context(job, _rules(job, network.spec), network, device, dtype, ledger.layout)
        of_receipts = {item.fingerprint for item in receipts}
        here = not executor.joins
        choice = choose_compile(plain, store, of_receipts, shards, executor.encoder_cores, encodes_here=here)
        context = plain.as_compiled() if choice.on else plain
        work = _work(job, shards, receipts, context, store)
        notices += [*work.notices, *other_settings_notices(work.others, store, context)]
        todo, before, reasons = work.todo(job.storage), work.before(), work.reasons()
        seen = bool(work.finished or work.touched)
        control.approve(BuildPlan(context.fingerprint, context.fingerprint_parts, shards, receipts, todo, seen))
        report = BuildReport(
            output=job.output,
            fingerprint=context.fingerprint,
            network=network.spec.network,
            untrained=bool(network.identity["untrained"]),
            device=device,
            compiled=choice.on,
            compile_reason=choice.reason,
            shards_total=len(todo) + len(work.finished),
            shards_before=len(work.finished),
            notices=notices,
            taken_down=work.taken_down,
            passed_over=passed_over.to_dict(),
        )
        del shards, receipts, work  # about 1 kB a source and receipt, which a build of days need not hold
        notices += _weights_notices(job.model.checkpoint, network.spec.network, network.identity, network.provenance)
        if todo:
            executor.connect()
            notices += [*executor.notices(), choice.line]
        for text in notices:
            display.notice(text)
        summaries.save()
        del summaries
        if todo:
            _write_card(context, store)
            admitted = control.budget.admitted(todo)
            rows = annotations.with_rows
            build = Build(admitted, context, executor, store, display, report, begun, control, rows)
            _run(build, context, store, display)
            if len(admitted) < len(todo):
                report.stopped = report.stopped or control.budget.shards_reached()
    if not todo:
        report.wall_s = time.monotonic() - begun  # else that of the build, as its log has it: ending Ray takes seconds
    _judge(report, job, before, reasons)
    return report


def _run(build: Build, context: BuildContext, store: Store, display: Display) -> None:
    """Runs the build, and names its data files however it ends. Raises what the build raises."""
    keeper = SummaryKeeper(store, context.layout)
    try:
        with keeper:
            build.run()
    except BaseException:
        try:
            _name_data(context, store)
        except LatheError as error:  # why the build ended matters more: an outage ends both
            display.notice(f"{HUGGING_FACE_KEY} may not name the new data files: {error}")
        raise
    finally:
        if keeper.failure is not None:
            display.notice(f"receipts could not be cached, so the next run takes longer to start: {keeper.failure}")
    _name_data(context, store)


def _work(
    job: EncodeJob, shards: list[Shard], receipts: list[ReceiptSummary], context: BuildContext, store: Store
) -> Work:
    """Work of this run, without inputs that were only touched, with rejects to retry."""
    work = find_work(shards, receipts, context.fingerprint, job, read_takedowns(store))
    if work.touched and (unchanged := find_unchanged(store, work.touched, job)):
        record_unchanged(store, unchanged, context)
        work = without_unchanged(work, unchanged)
    retry_work(store, work, job)
    return work


def _write_card(context: BuildContext, store: Store) -> None:
    """The data card, unless there is one, and what Hugging Face takes for data. Outputs of version 1 have neither."""
    _name_data(context, store)
    if context.layout.version < 2 or store.exists(CARD_KEY):
        return
    write = context.job.write
    card = data_card(
        context.fingerprint,
        context.file_metadata(),
        container=write.format,
        dtype=storage_name(write.dtype, write.compression),
        moments=write.moments,
        store=write.store,
    )
    store.put_if_absent(CARD_KEY, card.encode())


def _name_data(context: BuildContext, store: Store) -> None:
    """Writes what Hugging Face takes for data, with a new state: before and after data files are added."""
    if context.layout.version < 2:
        return
    found = store.read(HUGGING_FACE_KEY).decode("utf-8", "replace") if store.exists(HUGGING_FACE_KEY) else None
    state = f"data files of {datetime.now(UTC).isoformat()}"
    container = context.job.write.format
    files = data_files(store, context.fingerprint, container)
    config = hugging_face_config(found, context.fingerprint, container, state, files)
    if config is not None:
        store.write(HUGGING_FACE_KEY, config.encode())


def _weights_notices(
    checkpoint: str | None, name: str, identity: dict[str, Any], provenance: dict[str, Any]
) -> list[str]:
    """Notices about weights that are random or come with Lathe."""
    if identity["untrained"]:
        return ["UNTRAINED random weights: the latents will be meaningless; give --checkpoint for trained weights"]
    if not str(provenance.get("uri", "")).startswith("embedded://"):
        return []
    asked = "no --checkpoint" if checkpoint is None else f"--checkpoint {checkpoint}"
    return [
        f"{asked}: using the weights that come with Lathe ({name}); they are for demos and tests, not for production"
    ]


def _own_uris(store: Store) -> tuple[str, ...]:
    """Objects of the output, and its folders, which end in `/`. The output may lie inside a folder of inputs."""
    return (*map(store.uri, OWN_OBJECTS), *(f"{store.uri(name.rstrip('/'))}/" for name in OWN_FOLDERS))


def _without_own_output(shards: list[Shard], store: Store) -> list[Shard]:
    """Removes tars of latents: the output may lie inside a folder of inputs.

    Raises:
        InputError: no other inputs are left.
    """
    ours = f"{store.uri(DATA.rstrip('/'))}/"
    others = [shard for shard in shards if not all(source.uri.startswith(ours) for source in shard.objects)]
    if shards and not others:
        raise InputError(f"the inputs contain only files of the output {store.root}; name the videos")
    return others


def _rules(job: EncodeJob, spec: LatentSpec) -> ClipRules:
    if job.write.moments and not spec.moments:
        raise ConfigError(f"write.moments: {spec.network} has no log-variance; leave moments out to store the latent")
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    return with_images(rules, job.images, job.clips, spec.network)


def _judge(report: BuildReport, job: EncodeJob, before: Counts, reasons: Counter[str]) -> None:
    """Raises the error of a finished build, if there is one, with the report attached. `before`, `reasons`: of earlier runs."""
    error: LatheError | None = None
    whole = before + report.judged
    over = budget_exceeded(whole, job.reject_budget, final=True)
    if report.failed:
        name, why = min(report.failed.items())
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        error = ShardsFailed(
            f"{len(report.failed)} of {quantity(report.shards_total, 'shard')} failed; {name}: {why}{more}"
        )
    elif report.refused:
        more = f" (and {len(report.refused) - 1} more)" if len(report.refused) > 1 else ""
        error = ShardsFailed(
            f"{quantity(len(report.refused), 'input')} could not be read, the rest is committed; {report.refused[0]}{more}"
        )
    elif over is not None:
        error = RejectBudgetExceeded(over + (" (earlier runs included)" if before.samples else ""))
    elif report.stopped is not None:
        error = BudgetSpent(
            f"{report.stopped}; {report.shards_left} of {report.shards_total} shards are left, the next run goes on with them"
        )
    elif whole.clips == 0 and not job.allow_empty:
        found = reasons + Counter(report.judged_rejects)
        skipped = bool(found["no_video"] or found["still_image"]) and job.images.policy == "skip"
        error = NothingEncoded(_nothing_encoded(whole, found, report.taken_down, images_skipped=skipped))
    if error is not None:
        error.report = report  # type: ignore[attr-defined]
        raise error


def _nothing_encoded(whole: Counts, reasons: Counter[str], taken_down: int, *, images_skipped: bool) -> str:
    shown = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common(REASONS_SHOWN)) or "the inputs hold no video"
    if taken_down:
        shown += f"; {quantity(taken_down, 'input is', 'inputs are')} taken down"
    hint = "; --images keep encodes images" if images_skipped else ""
    return (
        f"nothing was encoded: {quantity(whole.samples, 'sample')} in, 0 clips out ({shown}); check the inputs and the clip rules{hint}; "
        "--allow-empty accepts it"
    )

"""One night: takes the lease, encodes what is new or changed, publishes it, stores a report. Takes a job, returns a `Night`.

What a limit or the first signal leaves is published without it, and the next night goes on. Killed at any moment, the next night goes on as
well: receipts and snapshots are whole or not there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipeline.engine.driver.budget import Budget
from pipeline.engine.driver.encode import encode
from pipeline.engine.driver.progress import Display, Silent
from pipeline.errors import (
    AccessError,
    BudgetSpent,
    GateFailed,
    Interrupted,
    LatheError,
    PublishFailed,
    RejectBudgetExceeded,
    ShardsFailed,
    ViewNotWritten,
)
from pipeline.ledger.addresses import check_whole_output
from pipeline.ledger.latent_set import read_latent_set
from pipeline.ledger.lease import Lease
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.look.canary import canary_check
from pipeline.nightly.approval import check_corpus, check_fingerprint
from pipeline.nightly.night import Night, RejectedInput, new_night
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.process import signals
from pipeline.report.written import make_stored_report
from pipeline.storage import is_remote, open_store

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.driver.budget import BuildPlan
    from pipeline.engine.driver.report import BuildReport
    from pipeline.records import SourceObject
    from pipeline.storage import Store

LEASE = "nightly"
REJECTS_SHOWN = 20


class Approval:
    """`Control` of the build of a night: its limits, whether it may start, whether the lease is still held."""

    def __init__(self, job: EncodeJob, store: Store, lease: Lease, night: Night, *, accept_fingerprint: bool) -> None:
        limits = job.nightly
        self.budget = Budget(limits.max_hours, limits.max_shards, limits.max_gpu_hours)
        self.listing: list[SourceObject] = []
        self._job = job
        self._store = store
        self._lease = lease
        self._night = night
        self._accept_fingerprint = accept_fingerprint

    def approve(self, plan: BuildPlan) -> None:
        """Raises as `check_corpus` and `check_fingerprint`."""
        if self._job.nightly.new_corpus == "refuse":
            check_corpus(self._store, plan)
        if not self._accept_fingerprint:
            check_fingerprint(self._store, plan)
        self.listing = sorted((item for shard in plan.listed for item in shard.objects), key=lambda item: item.uri)
        self._night.inputs_listed, self._night.shards_todo = len(self.listing), len(plan.todo)

    def check(self) -> None:
        """Raises LeaseLost."""
        self._lease.check_known()


def nightly(
    job: EncodeJob, display: Display | None = None, *, accept_fingerprint: bool = False, command: str = "lathe nightly"
) -> Night:
    """Runs one night. Ends with the outcome done, nothing, budget, or interrupted by one signal; else raises.

    Args:
        job: the build, with its section `nightly`.
        display: shows progress of the build.
        accept_fingerprint: encode although settings that change latents are others than in the last run.
        command: what another run is told of this one.

    Raises:
        LeaseHeld, LeaseLost: another night runs, or took over.
        UsageError: the job is wrong, or the output is of another corpus or fingerprint; nothing was encoded.
        GateFailed: too many damaged inputs, or a check of the snapshot failed; what was encoded stays, for the next night.
        BuildError, StorageUnavailable: the build or the publication failed.
        Errors have the `Night` as their attribute `night`.
    """
    display, began = display or Silent(), time.monotonic()
    night = new_night(job.output)
    try:
        store = open_store(check_whole_output(job.output), job.storage)
        if is_remote(job.output):
            _reach(store)
        with Lease(store, LEASE, command) as lease:
            _recorded(job, store, lease, night, display, began, accept_fingerprint=accept_fingerprint)
    except BaseException as error:
        display.close(None)
        if not night.ended:
            night.end(error, began)
        if isinstance(error, (BudgetSpent, Interrupted)):
            return night
        error.night = night  # type: ignore[attr-defined]
        raise
    return night


def _reach(store: Store) -> None:
    """Asks a remote store whether it answers.

    Raises:
        StorageUnavailable: it does not. To `preflight` an address that never answered is a wrong one; a night is repeated, and its store
            may be away when it starts.
        AccessError: it denies access.
    """
    try:
        store.preflight()
    except AccessError:
        store.probe()


def _recorded(
    job: EncodeJob,
    store: Store,
    lease: Lease,
    night: Night,
    display: Display,
    began: float,
    *,
    accept_fingerprint: bool,
) -> None:
    """Runs the night and stores its report, also if it fails; not after a second signal, which must not wait for a store."""
    try:
        _encode_and_publish(job, store, lease, night, display, accept_fingerprint=accept_fingerprint)
    except LatheError as error:
        night.end(error, began)
        raise
    else:
        night.end(None, began)
    finally:
        if night.ended and not signals.insisted():
            try:
                if read_latent_set(store) is not None:
                    night.store(store)
            except LatheError as error:
                display.notice(f"the report of this night could not be stored: {error}")


def _encode_and_publish(
    job: EncodeJob, store: Store, lease: Lease, night: Night, display: Display, *, accept_fingerprint: bool
) -> None:
    control = Approval(job, store, lease, night, accept_fingerprint=accept_fingerprint)
    stopped: BudgetSpent | Interrupted | ShardsFailed | None = None
    report: BuildReport | None = None
    try:
        report = encode(job, display, control)
    except (BudgetSpent, Interrupted) as error:
        stopped, report = error, error.report  # type: ignore[union-attr]
        if signals.insisted():
            raise
    except ShardsFailed as error:
        report = error.report  # type: ignore[attr-defined]
        if len(report.failed) + len(report.refused) > job.nightly.max_failed:
            raise
        stopped = error
    except RejectBudgetExceeded as error:
        report = error.report  # type: ignore[attr-defined]
        raise GateFailed(f"{error}; nothing was published, what is encoded stays") from error
    except BaseException as error:
        report = getattr(error, "report", None)
        raise
    finally:
        if report is not None:
            night.add_build(report)
            night.rejected = _rejected(store, report)
        display.close(report)
    lease.check()
    if stopped is None or night.shards_done:
        with signals.deferred():  # as while shards run: the first signal waits for what is done to be published
            _publish(job, store, night, control, partial=stopped is not None)
    if stopped is not None:
        raise stopped


def _publish(job: EncodeJob, store: Store, night: Night, control: Approval, *, partial: bool) -> None:
    """Publishes what is encoded, with the inputs as they were listed at the start: what came later is for the next night."""
    settings = job.nightly
    check = None
    if settings.canary:
        check = canary_check(
            job.storage,
            clips=settings.canary,
            psnr_floor=settings.psnr_floor,
            ssim_floor=settings.ssim_floor,
            checkpoint=job.model.checkpoint,
            # Runs here: the head of a cluster whose encoders have GPUs often has none.
            device="cpu" if job.model.device == "cpu" else "auto",
        )
    options = PublishOptions(
        removed=settings.removed,
        partial=partial,
        limits=Limits(reject_budget=job.reject_budget, drift=settings.max_drift, removed=settings.max_removed),
        job=job.model_dump(mode="json"),
        delta=settings.delta,
        fingerprint=_one_fingerprint(store, night),
    )
    try:
        published = publish(store, options, listing=control.listing, canary=check, failures=job.drill)
        night.add_published(published)
        if settings.report and published.made:
            _report(job, store, night)
    except ViewNotWritten as error:
        night.add_published(error.published)
        raise
    except PublishFailed as error:
        if all(found.ok for found in error.checks):
            raise
        raise GateFailed(
            f"{error.message}. What this night encoded stays, and the next night publishes it if its checks pass; when the cause is "
            f"known: lathe publish {job.output} INPUT…, with the limit raised if the change is meant",
            checks=error.checks,
        ) from error


def _report(job: EncodeJob, store: Store, night: Night) -> None:
    """Stores the page on the snapshot. A night whose page cannot be made has published its rows."""
    device = "cpu" if job.model.device == "cpu" else "auto"  # as for the canary
    try:
        night.page = make_stored_report(
            store, night.snapshot, job.storage, checkpoint=job.model.checkpoint, device=device
        )
    except LatheError as error:
        night.notices.append(f"the page on snapshot {night.snapshot} was not made: {error}")


def _one_fingerprint(store: Store, night: Night) -> str | None:
    """The fingerprint of this night if the newest snapshot holds no other: who published that one of several goes on with it. Else all."""
    newest = Snapshots(store).latest()
    return night.fingerprint if newest is not None and set(newest.fingerprints) == {night.fingerprint} else None


def _rejected(store: Store, report: BuildReport) -> list[RejectedInput]:
    """The first rejected inputs of this night, with their reasons."""
    found: list[RejectedInput] = []
    ledger = Ledger(store)
    for shard in report.rejecting:
        receipt = ledger.read(shard)
        for reject in receipt.rejects if receipt is not None else ():
            if len(found) < REJECTS_SHOWN:
                found.append(RejectedInput(reject.uri, reject.key, reject.reason, reject.message))
    return found

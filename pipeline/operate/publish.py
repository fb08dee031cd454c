"""Publication of the next snapshot of an output, if its checks pass (`lathe publish`). Files are listed, never copied.

Takes a store, the present listing of inputs (optional), and the canary check as a function (it needs torch). Returns the snapshot.
Without a listing nothing counts as removed, and open shards are known only from running builds.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import DrillConfig
from pipeline.corpus import job_annotations
from pipeline.errors import InputError, LatheError, PublishFailed, ViewNotWritten
from pipeline.ledger.candidate import gather
from pipeline.ledger.manifest import arrow_on_malloc, release_memory
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import NAMED_IN_RECORD, Snapshot, Snapshots
from pipeline.operate import publish_checks as checks
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.file_checks import files_check
from pipeline.operate.listed_inputs import list_shards
from pipeline.operate.lost_receipts import lost_receipts
from pipeline.operate.open_work import open_work, running_builds
from pipeline.operate.publish_base import Base, base_to_rebuild
from pipeline.operate.removed_check import removed_check
from pipeline.operate.snapshot_record import fingerprints_of, lineage_of, snapshot_of, tables_of
from pipeline.process.scratch import ScratchFolder
from pipeline.sidecars.versions import newest_versions
from pipeline.storage import is_remote
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import EncodeJob
    from pipeline.ledger.candidate import Candidate, Listing
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.snapshots import Check
    from pipeline.operate.delta_log import DeltaView
    from pipeline.operate.lost_receipts import LostReceipts
    from pipeline.operate.publish_checks import Limits
    from pipeline.records import SourceObject
    from pipeline.storage import Store

    Canary = Callable[[Store, Sequence[CountedReceipt]], Check]

CANARY_RECEIPTS = 8
WORKERS = 8


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What to publish."""

    fingerprint: str | None = None  # only fingerprints with this prefix
    removed: Literal["keep", "drop"] = "keep"  # for inputs that are not listed any more
    partial: bool = False  # publish although shards are open
    limits: Limits = field(default_factory=checks.Limits)
    job: dict[str, Any] | None = None  # recorded as lineage
    delta: bool = True  # write the Delta view as well
    rebuild: bool = False  # pass over damaged snapshots, read their receipts again, go on without those that are lost


@dataclass(frozen=True, slots=True)
class Published:
    """The newest snapshot. `made` is False if it already covered everything."""

    snapshot: Snapshot
    made: bool
    notices: list[str]
    delta: DeltaView | None = None  # state of the Delta view; None: not written


@dataclass(slots=True)
class Progress:
    """How far a publisher got: number of the record that it creates or created."""

    creating: int | None = None
    created: bool = False


def list_inputs(job: EncodeJob, store: Store) -> list[SourceObject]:
    """Present inputs of a job, sorted by URI, without latents of the output itself.

    Raises:
        ConfigError, InputError, AccessError: as for `lathe encode`.
    """
    ours = store.uri("data") + "/"
    with job_annotations(job) as annotations:
        found = [source for shard in list_shards(job, annotations) for source in shard.objects]
    return sorted((source for source in found if not source.uri.startswith(ours)), key=lambda source: source.uri)


def publish(
    store: Store,
    options: PublishOptions,
    *,
    listing: Listing = None,
    canary: Canary | None = None,
    failures: DrillConfig | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Published:
    """Publishes a snapshot that covers all receipts, unless the newest already does.

    Args:
        store: the output.
        options: what to publish.
        listing: the present inputs, or a function that lists them, see `gather`; None: unknown.
        canary: encodes a few clips of these receipts again and compares; None: this check is left out.
        failures: where to fail on purpose, for tests.
        workers: threads that read receipts; by default 8 where each read waits for a network, else 1.
        progress: is kept up to date, for a message after an interruption.

    Raises:
        ViewNotWritten: the snapshot is published, its Delta view is not up to date.
        OutputError: not an output, or of another format version; a Delta log that another program wrote to.
        InputError: no receipt, or none of this fingerprint; `removed` "drop" without a listing.
        PublishFailed: a check failed, shards are open, or another publisher was first. Nothing was published.
    """
    if options.removed == "drop" and listing is None:
        raise InputError(
            "--removed drop needs the inputs: lathe publish OUTPUT INPUT…; without them removed inputs are unknown"
        )
    workers = workers or (WORKERS if is_remote(store.root) else 1)
    Ledger(store).latent_set()
    log = DeltaLog(store)
    with arrow_on_malloc(), ScratchFolder() as folder:
        snapshots = Snapshots(store, failures)
        try:
            published = _publish(store, options, listing, canary, snapshots, log, folder, workers, progress)
        except PublishFailed:
            with suppress(LatheError):  # takedowns reach the view all the same
                _delta_view(log, options)
            raise
        try:
            view = _delta_view(log, options)
        except LatheError as error:
            raise ViewNotWritten(
                f"snapshot {published.snapshot.number} is published, but its Delta view was not written: {error}; publish again "
                "to write it, or use --no-delta",
                published=published,
            ) from error
    if published.made:
        snapshots.check_stays(published.snapshot)
    notices = view.notices() if view is not None else []
    if not options.delta and log.lacks_takedowns():
        notices.append("the Delta view may still show rows that were taken down; publish without --no-delta")
    return replace(published, notices=[*published.notices, *notices], delta=view)


def _publish(
    store: Store,
    options: PublishOptions,
    listing: Listing,
    canary: Canary | None,
    snapshots: Snapshots,
    log: DeltaLog,
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> Published:
    base = base_to_rebuild(store, snapshots) if options.rebuild else Base(*snapshots.newest_and_next())
    parent, prefix = base.parent, options.fingerprint or ""
    if options.delta:
        log.check()
    # Before receipts are listed: a build that ends meanwhile may have committed later.
    builds = running_builds(store, prefix)
    candidate = gather(
        store,
        parent,
        folder,
        fingerprint=options.fingerprint,
        listing=listing,
        drop_missing=options.removed == "drop",
        choices=base.choices,
        copies=base.copies,
        save=True,
        workers=workers,
    )
    log.known_takedowns = candidate.decisions.overlaps.takedowns
    if not candidate.receipts.num_rows:
        raise _nothing_to_publish(store, candidate, options)
    lost = lost_receipts(store, candidate, prefix)
    notices = _check_nothing_is_lost(store, candidate, lost, rebuild=options.rebuild)
    recorded = snapshots.open_shards(parent) if parent is not None else ()
    work = open_work(candidate, {**running_builds(store, prefix), **builds}, lost.replaced, recorded)
    if not options.partial:
        work.refuse(candidate)
    entries = work.entries()
    if parent is not None and entries == recorded and candidate.unchanged and not base.repairs:
        return Published(parent, False, [f"snapshot {parent.number} already covers everything; nothing was published"])
    release_memory()
    snapshot = _checked(store, candidate, options, base, entries[:NAMED_IN_RECORD], canary)
    if lost:
        snapshot = replace(snapshot, lineage={**snapshot.lineage, "lost_receipts": lost.to_dict()})
    release_memory()
    tables = tables_of(candidate, folder, entries if len(entries) > NAMED_IN_RECORD else ())
    snapshot.tables.update(snapshots.write_tables(base.number, tables))
    if progress is not None:
        progress.creating = base.number
    snapshots.create(snapshot)
    if progress is not None:
        progress.created = True
    return Published(snapshot, True, [*base.notices, *notices, *_notices(store, snapshot)])


def _nothing_to_publish(store: Store, candidate: Candidate, options: PublishOptions) -> InputError:
    there = [name[:8] for name in candidate.decisions.fingerprints]
    if options.fingerprint and there:
        return InputError(
            f"{store.root} has no receipt of fingerprint {options.fingerprint}; there are {', '.join(there)}"
        )
    return InputError(f"{store.root} has no receipt: nothing is encoded yet; run `lathe encode` first")


def _check_nothing_is_lost(store: Store, candidate: Candidate, lost: LostReceipts, *, rebuild: bool) -> list[str]:
    """Receipts that are lost change rows, counts or decisions of the next snapshot without a word. Returns notices.

    Raises:
        PublishFailed: some are lost whose rows are neither taken down nor encoded again, and `rebuild` is False.
    """
    parent = candidate.parent.number if candidate.parent is not None else None
    if lost.costly and not rebuild:
        gone = quantity(len(lost.costly), "receipt is", "receipts are")
        raise PublishFailed(
            f"{gone} gone from {store.root} or cut off although covered by snapshot {parent}, such as that of shard {lost.costly[0]}; "
            f"{lost.rows} of their rows are known to count nowhere else. Restore them, or encode their inputs again, or go on without "
            "them: --rebuild"
        )
    what = ""
    if lost:
        number = len(lost.replaced) + len(lost.costly)
        what = f"{quantity(number, 'receipt is', 'receipts are')} gone that snapshot {parent} covers, and left out"
    if lost.costly:
        return [f"{what}: {quantity(lost.rows, 'row')} of {len(lost.costly)} of them count nowhere else (--rebuild)"]
    return [f"{what}: their rows are taken down or encoded again"] if lost else []


def _delta_view(log: DeltaLog, options: PublishOptions) -> DeltaView | None:
    """Brings the Delta view up to date, also where an earlier publisher was killed before it did."""
    release_memory()
    return log.sync() if options.delta else None


def _checked(
    store: Store,
    candidate: Candidate,
    options: PublishOptions,
    base: Base,
    open_shards: Sequence[str],
    canary: Canary | None,
) -> Snapshot:
    prints = fingerprints_of(store, candidate)
    limits = options.limits
    done = [
        checks.conservation_check(candidate),
        files_check(store, candidate),
        checks.reject_check(candidate.receipts, limits),
        checks.finite_check(candidate),
        checks.drift_check(candidate, limits),
        checks.constants_check({name: (item.stats, item.constants) for name, item in prints.items()}, limits),
    ]
    if options.removed == "drop":
        done.append(removed_check(store, candidate, limits.removed))
    if canary is not None and all(check.ok for check in done):
        done.append(canary(store, candidate.fresh_parts(store, CANARY_RECEIPTS)))
    if failed := [check for check in done if not check.ok]:
        raise PublishFailed(
            f"snapshot {base.number} was not published, {len(failed)} of {len(done)} checks failed: "
            + "; ".join(f"{check.name}: {check.message}" for check in failed),
            checks=done,
        )
    lineage = lineage_of(candidate, candidate.listing, options.job, options.removed)
    if sidecars := newest_versions(store):
        lineage["sidecars"] = sidecars
    record = snapshot_of(candidate, base.number, prints, done, open_shards, lineage)
    return replace(record, passed_over=base.passed_over)


def _notices(store: Store, snapshot: Snapshot) -> list[str]:
    found = [
        f"check {check.name} was not judged: {check.message or 'nothing to compare'}"
        for check in snapshot.checks
        if not check.judged
    ]
    if snapshot.num_open:
        found.append(
            f"{quantity(snapshot.num_open, 'shard or input is', 'shards or inputs are')} not done and not in the snapshot"
        )
    if not store.conditional_writes():
        found.append(
            f"{store.root}: the store has no conditional writes, so it cannot refuse a second publisher; let only one run at a time"
        )
    return found

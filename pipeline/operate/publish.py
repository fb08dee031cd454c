"""Publication of the next snapshot of an output, if its checks pass (`lathe publish`). Files are listed, never copied.

Takes a store, the present listing of inputs (optional), and the canary check as a function (it needs torch). Returns the snapshot.
Without a listing nothing counts as removed, and open shards are known only from running builds.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import DrillConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import InputError, LatheError, OutputError, PublishFailed
from pipeline.ledger.candidate import gather
from pipeline.ledger.manifest import (
    CHOICES,
    arrow_on_malloc,
    choice_rows,
    read_table,
    release_memory,
    write_table,
)
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.operate import publish_checks as checks
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.file_checks import files_check
from pipeline.operate.publish_base import Base, base_to_rebuild
from pipeline.operate.removed_check import removed_check
from pipeline.operate.snapshot_record import fingerprints_of, lineage_of, snapshot_of
from pipeline.operate.status import heartbeats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import StorageConfig
    from pipeline.ledger.candidate import Candidate
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.snapshots import Check
    from pipeline.operate.delta_log import DeltaView
    from pipeline.operate.publish_checks import Limits
    from pipeline.records import SourceObject
    from pipeline.storage import Store

    Canary = Callable[[Store, Sequence[CountedReceipt]], Check]

NAMED = 3  # of open shards, in messages
CANARY_RECEIPTS = 8


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What to publish."""

    fingerprint: str | None = None  # only fingerprints with this prefix
    removed: Literal["keep", "drop"] = "keep"  # for inputs that are not listed any more
    partial: bool = False  # publish although shards are open
    limits: Limits = field(default_factory=checks.Limits)
    job: dict[str, Any] | None = None  # recorded as lineage
    delta: bool = True  # write the Delta view as well
    rebuild: bool = False  # pass over damaged snapshots; read their receipts again


@dataclass(frozen=True, slots=True)
class Published:
    """The newest snapshot. `made` is False if it already covered everything."""

    snapshot: Snapshot
    made: bool
    notices: list[str]
    delta: DeltaView | None = None  # state of the Delta view; None: not written


def list_inputs(inputs: Sequence[str], store: Store, storage: StorageConfig) -> list[SourceObject]:
    """Present inputs, sorted by URI, without latents of the output itself.

    Raises:
        InputError, AccessError: as for `lathe encode`.
    """
    ours = store.uri("data") + "/"
    found = [source for shard in resolve_inputs(inputs, storage) for source in shard.objects]
    return sorted((source for source in found if not source.uri.startswith(ours)), key=lambda source: source.uri)


def publish(
    store: Store,
    options: PublishOptions,
    *,
    listing: Sequence[SourceObject] | None = None,
    canary: Canary | None = None,
    failures: DrillConfig | None = None,
    workers: int = 8,
) -> Published:
    """Publishes a snapshot that covers all receipts, unless the newest already does.

    Args:
        store: the output.
        options: what to publish.
        listing: the present inputs; None: unknown.
        canary: encodes a few clips of these receipts again and compares; None: this check is left out.
        failures: where to fail on purpose, for tests.
        workers: threads that read receipts.

    Raises:
        OutputError: not an output, or of another format version; a Delta log that another program wrote to.
        InputError: no receipt, or none of this fingerprint; `removed` "drop" without a listing.
        PublishFailed: a check failed, shards are open, or another publisher was first. Nothing was published.
    """
    if options.removed == "drop" and listing is None:
        raise InputError(
            "--removed drop needs the inputs: lathe publish OUTPUT INPUT…; without them removed inputs are unknown"
        )
    Ledger(store).latent_set()
    with arrow_on_malloc(), tempfile.TemporaryDirectory(prefix="lathe-publish-") as folder:
        snapshots = Snapshots(store, failures)
        try:
            published = _publish(store, options, listing, canary, snapshots, Path(folder), workers)
        except PublishFailed:
            with suppress(LatheError):  # takedowns reach the view all the same
                _delta_view(store, options)
            raise
        try:
            view = _delta_view(store, options)
        except LatheError as error:
            raise OutputError(
                f"snapshot {published.snapshot.number} is published, but its Delta view was not written: {error}; publish again "
                "to write it, or use --no-delta"
            ) from error
    if published.made:
        snapshots.check_stays(published.snapshot)
    notices = view.notices() if view is not None else []
    return replace(published, notices=[*published.notices, *notices], delta=view)


def _publish(
    store: Store,
    options: PublishOptions,
    listing: Sequence[SourceObject] | None,
    canary: Canary | None,
    snapshots: Snapshots,
    folder: Path,
    workers: int,
) -> Published:
    base = base_to_rebuild(snapshots) if options.rebuild else Base(*snapshots.newest_and_next())
    parent = base.parent
    if options.delta:
        DeltaLog(store).check()
    candidate = gather(
        store,
        parent,
        folder,
        fingerprint=options.fingerprint,
        listing=listing,
        drop_missing=options.removed == "drop",
        choices=base.choices,
        save=True,
        workers=workers,
    )
    if not candidate.receipts.num_rows:
        raise _nothing_to_publish(store, candidate, options)
    _check_receipts_are_there(store, candidate, options.fingerprint or "")
    open_shards = _open_shards(store, candidate, options)
    if parent is not None and tuple(open_shards) == parent.open_shards and candidate.unchanged and not base.repairs:
        return Published(parent, False, [f"snapshot {parent.number} already covers everything; nothing was published"])
    release_memory()
    snapshot = _checked(store, candidate, options, base, open_shards, listing, canary)
    release_memory()
    tables = {"files": candidate.files_path, "receipts": candidate.receipts_path}
    if any(candidate.decisions.selection.choices.values()):
        choices = pa.Table.from_pylist(list(choice_rows(candidate.decisions.selection.choices)), schema=CHOICES)
        tables["choices"] = write_table(choices, folder / "choices")
    snapshot.tables.update(snapshots.write_tables(base.number, tables))
    snapshots.create(snapshot)
    return Published(snapshot, True, [*base.notices, *_notices(store, snapshot)])


def _nothing_to_publish(store: Store, candidate: Candidate, options: PublishOptions) -> InputError:
    there = [name[:8] for name in candidate.decisions.fingerprints]
    if options.fingerprint and there:
        return InputError(
            f"{store.root} has no receipt of fingerprint {options.fingerprint}; there are {', '.join(there)}"
        )
    return InputError(f"{store.root} has no receipt: nothing is encoded yet; run `lathe encode` first")


def _check_receipts_are_there(store: Store, candidate: Candidate, fingerprint: str) -> None:
    """Rows whose receipt was lost would otherwise leave the next snapshot without a word.

    Raises:
        PublishFailed: receipts of files that the parent names are gone.
    """
    if candidate.parent is None or candidate.parent_files is None:
        return
    files = read_table(candidate.parent_files, ["shard_id", "fingerprint"], ["fingerprint"])
    lost = files.filter(pc.invert(pc.is_in(files["shard_id"], candidate.decisions.shards)))
    lost = lost.filter(pc.starts_with(pc.cast(lost["fingerprint"], pa.string()), fingerprint))
    if gone := sorted(lost["shard_id"].unique().to_pylist()):
        raise PublishFailed(
            f"{len(gone)} receipts of {store.root} are gone although snapshot {candidate.parent.number} "
            f"names their files, such as that of shard {gone[0]}; restore them, or remove their rows by a takedown"
        )


def _delta_view(store: Store, options: PublishOptions) -> DeltaView | None:
    """Brings the Delta view up to date, also where an earlier publisher was killed before it did."""
    release_memory()
    return DeltaLog(store).sync() if options.delta else None


def _checked(
    store: Store,
    candidate: Candidate,
    options: PublishOptions,
    base: Base,
    open_shards: list[str],
    listing: Sequence[SourceObject] | None,
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
    lineage = lineage_of(candidate, listing, options.job, options.removed)
    record = snapshot_of(candidate, base.number, prints, done, open_shards, lineage)
    return replace(record, passed_over=base.passed_over)


def _open_shards(store: Store, candidate: Candidate, options: PublishOptions) -> list[str]:
    """What is known not to be done: listed sources without a receipt, receipts that were cut off, shards of running builds.

    Raises:
        PublishFailed: there are some, and `options.partial` is False.
    """
    decisions = candidate.decisions
    sources = [source.uri for source in decisions.selection.open_sources]
    cut_off = [f"receipt of shard {shard} (cut off)" for shard in candidate.cut_off]
    builds, left = [], 0
    for build in heartbeats(store, Ledger(store).layout.progress):
        wanted = str(build.get("fingerprint", "")).startswith(options.fingerprint or "")
        open_now = int(build.get("shards_total") or 0) - int(build.get("shards_done") or 0)
        if build.get("running", True) and wanted and open_now > 0:
            left += open_now
            builds.append(f"{open_now} shards of the running build {build.get('build')}")
    if (found := [*sources, *cut_off, *builds]) and not options.partial:
        number = len(sources) + len(cut_off) + left
        under = ""
        if sources and len(decisions.fingerprints) > 1:
            under = f" under fingerprint {str(decisions.current)[:8]}, that of the newest receipt"
        raise PublishFailed(
            f"{number} shards or inputs are not done{under}: {', '.join([*builds, *cut_off, *sources][:NAMED])}; finish them "
            "with `lathe encode`, or publish what is done with --partial"
        )
    return found


def _notices(store: Store, snapshot: Snapshot) -> list[str]:
    found = [
        f"check {check.name} was not judged: {check.message or 'nothing to compare'}"
        for check in snapshot.checks
        if not check.judged
    ]
    if snapshot.open_shards:
        found.append(f"{len(snapshot.open_shards)} shards or inputs are not done and not in the snapshot (--partial)")
    if not store.conditional_writes():
        found.append(
            f"{store.root}: the store has no conditional writes, so it cannot refuse a second publisher; let only one run at a time"
        )
    return found

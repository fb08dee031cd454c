"""Compaction of an output (`lathe compact`): small data files merged and rows that do not count dropped, as the next snapshot.

Takes a store, returns the snapshot. It covers what its parent covers: the same rows with the same ids, values and tensors, in other
files. Receipts do not change; the table `copies` says where their rows are. Old files stay until `lathe gc` deletes them. A kill leaves
at worst files that no snapshot names.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import DrillConfig
from pipeline.errors import LatheError, PublishFailed, ViewNotWritten
from pipeline.ledger.candidate import gather
from pipeline.ledger.lease import MAINTENANCE, Lease
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import FILES, arrow_on_malloc, read_batches, release_memory
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import NAMED_IN_RECORD, Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate import publish_checks as checks
from pipeline.operate.compact_files import CompactionWriter
from pipeline.operate.compact_hidden import hidden_files
from pipeline.operate.compact_plan import plan
from pipeline.operate.compact_tables import rewritten
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.file_checks import files_check
from pipeline.operate.hugging_face import name_data_files
from pipeline.operate.lost_receipts import lost_receipts
from pipeline.operate.snapshot_record import changes_of, fingerprints_of, lineage_of, snapshot_of, tables_of
from pipeline.operate.stored_rows import checked_index
from pipeline.process.scratch import ScratchFolder
from pipeline.storage import is_remote
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.ledger.candidate import Candidate
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.operate.compact_files import Part
    from pipeline.operate.compact_plan import Group
    from pipeline.operate.compact_tables import Rewritten
    from pipeline.operate.delta_log import DeltaView
    from pipeline.storage import Store

TRIES = 5  # when publishers are first
WORKERS = 8


@dataclass(frozen=True, slots=True)
class CompactOptions:
    """What to rewrite."""

    target_bytes: int = 512 * 1024 * 1024
    only_takedowns: bool = False  # only files with rows that were taken down
    dry_run: bool = False
    delta: bool = True  # bring the Delta view up to date as well


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was done, or with `dry_run` would be. `snapshot`: the new one; None if nothing was published."""

    parent: int
    files_before: int
    files_after: int
    bytes_read: int
    bytes_written: int  # 0 in a dry run
    rows_dropped: int  # that are in no file of the snapshot any more
    snapshot: Snapshot | None = None
    notices: list[str] = field(default_factory=list)
    delta: DeltaView | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the record of the snapshot."""
        counts = ("parent", "files_before", "files_after", "bytes_read", "bytes_written", "rows_dropped", "notices")
        delta = None if self.delta is None else self.delta.to_dict()
        number = None if self.snapshot is None else self.snapshot.number
        return {"snapshot": number, **{name: getattr(self, name) for name in counts}, "delta": delta}


def compact(
    store: Store,
    options: CompactOptions | None = None,
    *,
    failures: DrillConfig | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Compaction:
    """Publishes a snapshot of the same rows in fewer files, unless there is nothing to do.

    Args:
        store: the output.
        options: what to rewrite.
        failures: where to fail on purpose, for tests.
        workers: threads that read receipts and indexes; by default 8 where each read waits for a network, else 1.
        progress: called with bytes of source files that were copied since its last call, and of all; from any thread.

    Raises:
        InputError: nothing is published yet.
        OutputError: not an output, a snapshot that cannot be read, a file that does not have its recorded bytes.
        LeaseHeld: another compaction or `lathe gc` runs.
        PublishFailed: receipts are lost, a check failed, or publishers were first `TRIES` times. Nothing was published.
        ViewNotWritten: the snapshot is published, its Delta view is not up to date.
    """
    options = options or CompactOptions()
    workers = workers or (WORKERS if is_remote(store.root) else 1)
    Ledger(store).latent_set()
    log = DeltaLog(store)
    with arrow_on_malloc(), ScratchFolder() as folder:
        snapshots = Snapshots(store, failures)
        if options.delta:
            log.check()
        if options.dry_run:
            candidate = _candidate(store, snapshots.get(None), folder, workers)
            hidden = hidden_files(store, candidate, folder, only_takedowns=options.only_takedowns, workers=workers)
            return _planned(candidate, _groups(store, candidate, options, workers), hidden)
        with Lease(store, MAINTENANCE, "lathe compact") as lease:
            made = _compacted(store, options, snapshots, lease, folder, workers, failures, progress)
    if made.snapshot is None:
        return made
    name_data_files(store)
    try:
        view = log.sync() if options.delta else None
    except LatheError as error:
        raise ViewNotWritten(
            f"snapshot {made.snapshot.number} is published, but its Delta view was not written: {error}; `lathe publish` writes it"
        ) from error
    snapshots.check_stays(made.snapshot)
    return replace(made, delta=view, notices=[*made.notices, *(view.notices() if view is not None else [])])


def _compacted(
    store: Store,
    options: CompactOptions,
    snapshots: Snapshots,
    lease: Lease,
    folder: Path,
    workers: int,
    failures: DrillConfig | None,
    progress: Callable[[int, int], None] | None,
) -> Compaction:
    parent = snapshots.get(None)
    candidate = _candidate(store, parent, folder, workers)
    groups = _groups(store, candidate, options, workers)
    hidden = hidden_files(store, candidate, folder, only_takedowns=options.only_takedowns, workers=workers)
    if not groups and not hidden:
        return replace(_planned(candidate), notices=["nothing to do: no file is small or has rows that do not count"])
    release_memory()
    total = sum(group.num_bytes for group in groups)
    with CompactionWriter(store, Ledger(store).layout, failures) as writer:
        files = writer.write(groups, None if progress is None else lambda num_bytes: progress(num_bytes, total))
        notices = [
            f"{key} was left as it is: another version of Lathe wrote it, with other columns" for key in writer.left
        ]
        if not files and not hidden:
            return replace(_planned(candidate), notices=notices)
        for _ in range(TRIES):
            # Publishers and takedowns that came in between: their rows are in, or out, of this snapshot too.
            newest, number = snapshots.newest_and_next()
            if newest is not None and (newest != parent or _newer_takedowns(store, candidate)):
                parent = newest
                candidate = _candidate(store, parent, Path(tempfile.mkdtemp(dir=folder)), workers)
            found = rewritten(candidate, files, hidden, folder)
            snapshot = _record(store, snapshots, parent, candidate, found, number)
            entries = snapshots.open_shards(parent)
            tables = tables_of(found.candidate, folder, entries if len(entries) > NAMED_IN_RECORD else ())
            snapshot.tables.update(snapshots.write_tables(number, tables))
            lease.check()
            writer.keep()  # a signal, or a store that fails now, does not say whether the record is there, which names the files
            try:
                snapshots.create(snapshot)
            except PublishFailed:  # it is not there
                writer.keep(False)
                if snapshots.latest() == parent:
                    raise
                continue
            written = sum(item.file.num_bytes for item in files)
            return Compaction(
                parent.number,
                found.files_before + found.files_dropped,
                found.files_after,
                total,
                written,
                found.rows_dropped,
                snapshot,
                notices,
            )
    raise PublishFailed(
        f"publishers of {store.root} were first {TRIES} times; nothing of this compaction was published. Run again"
    )


def _candidate(store: Store, parent: Snapshot, folder: Path, workers: int) -> Candidate:
    """Contents of the parent with the takedowns of now, without receipts that it does not cover.

    Raises:
        PublishFailed: receipts that it covers are lost.
    """
    candidate = gather(store, parent, folder, only_covered=True, save=True, workers=workers)
    if (lost := lost_receipts(store, candidate)).costly:
        gone = quantity(len(lost.costly), "receipt is", "receipts are")
        raise PublishFailed(
            f"{gone} gone or cut off although covered by snapshot {parent.number}, such as that of shard {lost.costly[0]}; "
            f"`lathe publish {store.root}` says what to do. Nothing was compacted"
        )
    return candidate


def _groups(store: Store, candidate: Candidate, options: CompactOptions, workers: int) -> list[Group]:
    takedowns = candidate.decisions.overlaps.takedowns

    def taken(file: dict[str, Any]) -> bool:
        hidden = set(file["hidden"])
        return any(row.row in hidden and takedowns.hides(row) for row in checked_index(store, file))

    files = (row for batch in read_batches(candidate.files_path, FILES.names) for row in batch.to_pylist())
    if not options.only_takedowns:
        return plan(files, options.target_bytes)
    hiding = [file for file in files if file["hidden"]]
    found = zip(hiding, mapped_ahead(taken, hiding, workers, "indexes"), strict=True)
    return plan([file for file, is_taken in found if is_taken], options.target_bytes, merge=False)


def _planned(candidate: Candidate, groups: Sequence[Group] = (), hidden: Sequence[Part] = ()) -> Compaction:
    parent = candidate.parent.number if candidate.parent is not None else 0
    files = sum(len(group.files) for group in groups) + len(hidden)
    dropped = sum(len(file["hidden"]) for group in groups for file in group.files)
    dropped += sum(len(part.dropped) for part in hidden)
    return Compaction(parent, files, len(groups), sum(group.num_bytes for group in groups), 0, dropped)


def _newer_takedowns(store: Store, candidate: Candidate) -> bool:
    known = candidate.decisions.overlaps.takedowns
    return read_takedowns(store, known=known).records != known.records


def _record(
    store: Store, snapshots: Snapshots, parent: Snapshot, candidate: Candidate, found: Rewritten, number: int
) -> Snapshot:
    """The record of the snapshot, without tables.

    Raises:
        PublishFailed: a check failed.
    """
    new = found.candidate
    prints = fingerprints_of(store, new)
    done = [checks.conservation_check(new), files_check(store, new), checks.finite_check(new)]
    if failed := [check for check in done if not check.ok]:
        raise PublishFailed(
            f"snapshot {number} was not published, {len(failed)} of {len(done)} checks failed: "
            + "; ".join(f"{check.name}: {check.message}" for check in failed),
            checks=done,
        )
    about = {
        "files_before": found.files_before + found.files_dropped,
        "files_after": found.files_after,
        "rows_dropped": found.rows_dropped,
    }
    fresh = lineage_of(candidate, None, None, "keep")
    lineage = {**parent.lineage, **{name: fresh[name] for name in ("lathe", "publisher")}, "compaction": about}
    entries = snapshots.open_shards(parent)[:NAMED_IN_RECORD]
    record = snapshot_of(new, number, prints, done, entries, lineage)
    files = {"files_added": found.files_after, "files_dropped": found.files_before}
    return replace(record, changes={**changes_of(candidate), **files}, passed_over=parent.passed_over)

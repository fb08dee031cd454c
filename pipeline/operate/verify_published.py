"""Checks of what snapshots name, for `lathe verify`: their records and tables, receipts that are gone, data files that no receipt leads to.

A data file that only older snapshots name was replaced by `lathe compact`, or its receipt is retired. A compacted file may be in no
snapshot: `publish --fingerprint` leaves those of other fingerprints out, and a later publish takes them in again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, NotFound, OutputError
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import FILES, written_file
from pipeline.ledger.receipts import Ledger, retired_shards
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.verify_files import Checked, FilePart, Problem, check_file
from pipeline.records import variant_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pipeline.ledger.copies import Copies
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.operate.verify import VerifyReport
    from pipeline.storage import Store

LISTED_RECEIPTS = 20  # lost ones that are listed; the rest are counted
AS_PUBLISHED = "its record and tables as published"


def check_published(store: Store, report: VerifyReport) -> list[Snapshot]:
    """Reads the record and all tables of every snapshot. Returns those that are whole, the newest first.

    A damaged one that a later snapshot passed over is a notice, one that `lathe gc` deletes meanwhile is nothing.
    """
    snapshots, whole = Snapshots(store), []
    passed_over: set[int] = set()
    for number in reversed(snapshots.numbers()):
        try:
            whole.append(snapshots.whole(number))
            passed_over.update(whole[-1].passed_over)
        except (InputError, OutputError) as error:
            if number in passed_over:
                report.notices.append(f"snapshot {number} is damaged, a later one passed over it: {error.message}")
            elif number in snapshots.numbers():
                report.problems.append(Problem(f"snapshot {number}", error.message, AS_PUBLISHED))
    return whole


def lost_receipts(store: Store, newest: Snapshot, there: Collection[str]) -> list[Problem]:
    """Receipts that a snapshot covers, without those of the shards `there` and those that `lathe gc` retired as nothing of them counts."""
    ledger, retired = Ledger(store), retired_shards(store)
    known, moved = (pa.array(sorted(shards), pa.string()) for shards in (there, retired))
    lost: list[str] = []
    for batch in Snapshots(store).batches(newest, "receipts", ["shard_id", "clips"]):
        on_purpose = pc.and_(pc.is_in(batch["shard_id"], moved), pc.equal(batch["clips"], 0))
        lost += batch["shard_id"].filter(pc.invert(pc.or_(pc.is_in(batch["shard_id"], known), on_purpose))).to_pylist()
    if lost:  # `lathe gc` may have moved some back since receipts were listed
        lost = sorted(set(lost) - set(ledger.keys_by_shard()))
    expected = f"one that snapshot {newest.number} covers; restore it, or see what `lathe publish` says"
    moves_back = (
        f"one, as rows of it count in snapshot {newest.number}; `lathe gc` moves it back, or says that another is lost"
    )
    found = []
    for shard in lost[:LISTED_RECEIPTS]:
        text = ("only a retired receipt", moves_back) if shard in retired else ("no such receipt", expected)
        found.append(Problem(ledger.layout.receipt_key(shard), *text))
    if (rest := len(lost) - LISTED_RECEIPTS) > 0:
        found.append(Problem(ledger.layout.receipts, f"{rest} more receipts are gone", expected))
    return found


class _NamedFile(NamedTuple):
    """Row of `manifest.FILES`. `snapshot`: number of the newest one that names it; None: the copies do, whether a snapshot does or not."""

    row: dict[str, Any]
    snapshot: int | None


def check_other_files(
    store: Store,
    report: VerifyReport,
    snapshots: Sequence[Snapshot],
    copies: Copies,
    takedowns: Takedowns,
    variants: dict[str, tuple[str, ...]],
    checked: Collection[str],
    workers: int,
) -> set[str]:
    """Checks compacted files, and all others that snapshots name. Rows of compacted files are counted with their receipts.

    Args:
        store: the output.
        report: gets problems, and a notice about files that only older snapshots name. `files` counts the compacted ones.
        snapshots: all that are whole, the newest first.
        copies: those of the newest snapshot.
        takedowns: of the output; a file that they hide entirely may be gone.
        variants: by fingerprint, of receipts.
        checked: keys of data files that were checked with their receipts.
        workers: threads.

    Returns keys of the files and of their indexes.
    """
    known = {name: variant_names(item.parts) for snapshot in snapshots for name, item in snapshot.fingerprints.items()}
    known |= variants

    def check(file: _NamedFile) -> tuple[_NamedFile, Checked]:
        row, found = file.row, Checked(None)
        variants_of = known.get(row["fingerprint"], variant_names({}))
        part = FilePart(lambda rows: [], row["fingerprint"], row["shard_id"], takedowns, variants_of)
        try:
            check_file(store, written_file(row), part, report.deep, found)
        except NotFound:
            found.problems.append(Problem(row["key"], "deleted while it was read", f"{row['bytes']} bytes"))
        return file, found

    keys: set[str] = set()
    older_files = older_bytes = 0
    damaged: list[tuple[int | None, Problem]] = []
    for (row, number), found in mapped_ahead(check, _others(store, snapshots, copies, checked), workers, "verify"):
        keys |= {row["key"], row["index_key"]}
        report.bytes_read += found.bytes_read
        if number is None or number == snapshots[0].number:  # of the newest one, if its receipt is lost
            report.files += 1
        else:
            older_files, older_bytes = older_files + 1, older_bytes + row["bytes"]
        damaged += [(number, problem) for problem in found.problems]
    report.problems += _still_needed(store, damaged)
    if older_files:
        report.notices.append(
            f"{older_files} data files ({older_bytes} bytes) that only older snapshots need were checked as well; `lathe gc` deletes them "
            "with these snapshots"
        )
    return keys


def _still_needed(store: Store, damaged: list[tuple[int | None, Problem]]) -> list[Problem]:
    """Problems of files with the numbers of the snapshots that need them, without those that `lathe gc` deleted meanwhile."""
    there = Snapshots(store).numbers() if damaged else []
    found = [problem for number, problem in damaged if number is None]
    return found + [
        replace(problem, expected=f"{problem.expected}, for snapshot {number}")
        for number, problem in damaged
        if number in there
    ]


def _others(
    store: Store, snapshots: Sequence[Snapshot], copies: Copies, checked: Collection[str]
) -> Iterator[_NamedFile]:
    """Files of `copies` and of snapshots that are not among `checked`, each once. Memory: their keys, and a batch of rows."""
    seen = {*checked, *copies.files}
    yield from (_NamedFile(row, None) for row in copies.files.values())
    for snapshot in snapshots:
        try:
            for batch in Snapshots(store).batches(snapshot, "files", FILES.names):
                fresh = batch.filter(pa.array([key not in seen for key in batch["key"].to_pylist()], pa.bool_()))
                seen.update(fresh["key"].to_pylist())
                yield from (_NamedFile(row, snapshot.number) for row in fresh.to_pylist())
        except OutputError:
            if snapshot.number in Snapshots(store).numbers():  # else `lathe gc` deleted it meanwhile
                raise

"""Verification of an output: compares files with receipts and snapshots (sizes, hashes, counts, offsets).

Takes a store, returns a `VerifyReport` with its problems (file, found, expected). `deep` reads all bytes once, in pieces; without it only
receipts, sizes, indexes and footers are read. Files that neither a receipt nor a snapshot names are a notice, not a problem.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import NotFound, OutputError
from pipeline.format.index import read_index
from pipeline.format.layout import COMPACTED, DATA, DELTA_LOG, TAKEDOWNS, is_foreign_cache
from pipeline.ledger.copies import NO_COPIES
from pipeline.ledger.counted import shown
from pipeline.ledger.latent_set import layout_by_names
from pipeline.ledger.manifest import written_file
from pipeline.ledger.overlaps import Overlaps
from pipeline.ledger.receipts import Ledger, imbalances
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import NONE, read_takedowns
from pipeline.operate.delta_log import LACKS_TAKEDOWNS, DeltaLog
from pipeline.operate.verify_files import Checked, FilePart, Problem, check_file
from pipeline.operate.verify_published import AS_PUBLISHED, check_other_files, check_published, lost_receipts
from pipeline.records import FORMAT_VERSIONS, variant_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.format.index import IndexRow
    from pipeline.format.layout import Layout
    from pipeline.ledger.copies import Copies, Copy
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.storage import ObjectInfo, Store

LISTED_IDS = 20  # repeated ids that are listed; the rest are counted


@dataclass(slots=True)
class VerifyReport:
    """Result of a verification. Notices are not problems: orphans, receipts that do not count, foreign objects."""

    root: str
    deep: bool
    shards: int = 0
    files: int = 0
    rows: int = 0
    frames: int = 0
    bytes_read: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with `ok`."""
        return {"ok": self.ok, **asdict(self)}


def verify_output(store: Store, *, deep: bool = True, snapshot: int | None = None, workers: int = 4) -> VerifyReport:
    """Verifies the output at `store`, or only files of snapshot number `snapshot`. Memory: a few pieces, and 8 bytes per row.

    Raises:
        StorageUnavailable, AccessError: the store cannot be reached. Problems of the output are reported, not raised.
    """
    report = VerifyReport(store.root, deep)
    layout = layout_by_names(store)
    ledger = Ledger(store, layout=layout)
    try:
        ledger.latent_set()
    except OutputError as error:
        expected = f"an output of format version {min(FORMAT_VERSIONS)} to {max(FORMAT_VERSIONS)}"
        report.problems.append(Problem(layout.set_key, error.message, expected))
    if snapshot is not None:
        _verify_snapshot(store, snapshot, report, workers)
        return report
    snapshots = check_published(store, report)
    takedowns, copies = _takedowns(store, report), _copies(store)
    if takedowns and DeltaLog(store).lacks_takedowns():
        report.problems.append(Problem(DELTA_LOG, *LACKS_TAKEDOWNS))
    # Listed before receipts: see `receipts.orphans`.
    stored = [info for prefix in (DATA, layout.index) for info in store.list(prefix)]
    foreign = [info.key for info in store.list(layout.receipts) if not layout.receipt_name(info.key)]
    report.notices += [f"{key}: not a receipt's name" for key in foreign]
    shards = ledger.keys_by_shard()
    report.problems += lost_receipts(store, snapshots[0], shards) if snapshots else []
    named: set[str] = set()
    replaced: set[str] = set()  # by compactions
    variants: dict[str, tuple[str, ...]] = {}
    deleted = 0
    ids: list[tuple[str, np.ndarray]] = []
    for checked in _check_shards(store, ledger, shards, report, takedowns, copies, workers):
        deleted += checked.deleted
        report.problems += checked.problems
        report.notices += checked.notices
        report.bytes_read += checked.bytes_read
        ids += checked.ids
        if checked.part is not None:
            report.shards += 1
            variants[checked.part.receipt.fingerprint] = variant_names(checked.part.receipt.fingerprint_parts)
            copied = checked.part.copies.of(checked.part.receipt.shard_id)
            files = [item for item in checked.part.receipt.files if item.key not in copied]
            named |= {key for item in files for key in (item.key, item.index_key)}
            replaced |= {key for item in checked.part.receipt.files for key in (item.key, item.index_key)} - named
            report.files += len(files)
            report.rows += checked.rows
            report.frames += checked.frames
    _note_deleted(report, deleted)
    named |= check_other_files(store, report, snapshots, copies, takedowns, variants, named, workers)
    report.problems += _doubled_ids(store, ids)
    _note_replaced(report, [info for info in stored if info.key in replaced or f"-{COMPACTED}" in info.key], named)
    stored = [info for info in stored if info.key not in replaced and f"-{COMPACTED}" not in info.key]
    named |= {info.key for info in stored if info.key.startswith(DELTA_LOG)}
    _count_orphans(report, [info for info in stored if info.key not in named])
    return report


def _verify_snapshot(store: Store, number: int, report: VerifyReport, workers: int) -> None:
    """Checks every file of the manifest, with its rows and frames that count; reads no receipts."""
    snapshots, takedowns = Snapshots(store), _takedowns(store, report)
    try:
        snapshot = snapshots.whole(number)
        files = snapshots.table(snapshot, "files").to_pylist()
    except (OutputError, ValueError) as error:
        report.problems.append(Problem(f"snapshot {number}", str(error), AS_PUBLISHED))
        return
    report.shards = snapshot.counts["shards"]
    report.files = len(files)
    ids: list[tuple[str, np.ndarray]] = []
    variants = {name: variant_names(item.parts) for name, item in snapshot.fingerprints.items()}

    def check(row: dict[str, Any]) -> Checked:
        checked = Checked(None)
        hidden = set(row["hidden"])
        item = written_file(row)

        def visible(rows: list[IndexRow]) -> list[IndexRow]:
            return [found for found in rows if found.row not in hidden and not takedowns.hides(found)]

        facts = FilePart(visible, row["fingerprint"], row["shard_id"], takedowns, variants[row["fingerprint"]])
        check_file(store, item, facts, report.deep, checked)
        if not takedowns and not checked.problems and (checked.rows, checked.frames) != (row["rows"], row["frames"]):
            found = f"{checked.rows} rows, {checked.frames} frames that count"
            checked.problems.append(Problem(item.key, found, f"{row['rows']} rows, {row['frames']} frames"))
        return checked

    deleted = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        for checked in pool.map(check, files):
            deleted += checked.deleted
            report.problems += checked.problems
            report.bytes_read += checked.bytes_read
            report.rows += checked.rows
            report.frames += checked.frames
            ids += checked.ids
    _note_deleted(report, deleted)
    if not takedowns and report.rows != snapshot.counts["rows"] and report.ok:
        report.problems.append(Problem(f"snapshot {number}", f"{report.rows} rows", f"{snapshot.counts['rows']} rows"))
    report.problems += _doubled_ids(store, ids)


def _takedowns(store: Store, report: VerifyReport) -> Takedowns:
    """All takedowns; none if one cannot be read, which is reported."""
    try:
        return read_takedowns(store)
    except OutputError as error:
        report.problems.append(Problem(TAKEDOWNS, error.message, "records of takedowns that can be read"))
        return NONE


def _copies(store: Store) -> Copies:
    """Copies of rows in the newest snapshot; none if it is damaged, which is reported."""
    try:
        return published_copies(store)
    except OutputError:
        return NO_COPIES


def _note_replaced(report: VerifyReport, stored: list[ObjectInfo], named: set[str]) -> None:
    left = [info for info in stored if info.key not in named]
    if left:
        report.notices.append(
            f"{len(left)} files ({sum(info.size for info in left)} bytes) that `lathe compact` replaced or left behind and no snapshot "
            f"names, such as {left[0].key}; `lathe gc` deletes them"
        )


def _note_deleted(report: VerifyReport, deleted: int) -> None:
    if deleted:
        report.notices.append(f"{deleted} files are deleted of receipts whose sources are all taken down")


def _count_orphans(report: VerifyReport, unnamed: list[ObjectInfo]) -> None:
    caches = [info for info in unnamed if is_foreign_cache(info.key)]
    orphans = [info for info in unnamed if not is_foreign_cache(info.key)]
    if caches:
        report.notices.append(
            f"{len(caches)} files ({sum(info.size for info in caches)} bytes) that another reader cached, such as {caches[0].key}: "
            "delete them after a build has added files, or that reader does not see the new ones"
        )
    report.orphans, report.orphan_bytes = len(orphans), sum(info.size for info in orphans)
    if orphans:
        report.notices.append(
            f"{len(orphans)} files ({report.orphan_bytes} bytes) that no receipt names, such as {orphans[0].key}: "
            "of a running build, left by a killed one, or of inputs that were replaced; `lathe gc` deletes those that nothing needs"
        )


def _overlaps(store: Store, layout: Layout, takedowns: Takedowns, copies: Copies) -> Overlaps:
    """Which receipt counts for which source. Empty if a receipt has another format version, which is reported elsewhere."""
    try:
        return Overlaps(Summaries(store, layout=layout).all(), takedowns, copies)
    except OutputError:
        return Overlaps([])


def _check_shards(
    store: Store,
    ledger: Ledger,
    shards: dict[str, list[str]],
    report: VerifyReport,
    takedowns: Takedowns,
    copies: Copies,
    workers: int,
) -> Iterator[Checked]:
    overlaps = _overlaps(store, ledger.layout, takedowns, copies)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        pending: deque[Any] = deque()
        for shard_id, keys in shards.items():
            if len(keys) > 1:
                report.notices.append(
                    f"shard {shard_id} has {len(keys)} receipts; the earliest that is complete counts"
                )
            pending.append(pool.submit(_check_shard, store, ledger, keys, overlaps, report.deep))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _check_shard(store: Store, ledger: Ledger, keys: list[str], overlaps: Overlaps, deep: bool) -> Checked:
    try:
        receipt = ledger.load_first(keys)
    except OutputError as error:
        return Checked(None, [Problem(keys[0], error.message, "a receipt of this format")])
    if receipt is None:
        found = "an empty or cut-off receipt: its shard counts as not done"
        return Checked(None, [Problem(keys[0], found, "complete JSON; run the build again")])
    part = overlaps.counted(receipt)
    checked = Checked(part)
    if elsewhere := len(part.hidden_uris) or len(part.hidden_samples):
        checked.notices.append(f"{keys[0]}: {elsewhere} inputs count in another receipt; their rows here are hidden")
    checked.problems += [Problem(keys[0], text, "counts that add up") for text in imbalances(receipt)]
    if (expected := receipt.shard.id(receipt.fingerprint)) != receipt.shard_id:
        checked.problems.append(
            Problem(keys[0], f"shard id {receipt.shard_id}", f"{expected} from its sources and fingerprint")
        )
    copied = part.copies.of(receipt.shard_id)
    for item in receipt.files:
        if item.key in copied:
            for copy in copied[item.key]:
                _count_copy(store, part, copy, checked)
            continue
        names = variant_names(receipt.fingerprint_parts)
        facts = FilePart(lambda rows: shown(part, rows), receipt.fingerprint, receipt.shard_id, part.takedowns, names)
        check_file(store, item, facts, deep, checked)
    return checked


def _count_copy(store: Store, part: CountedReceipt, copy: Copy, checked: Checked) -> None:
    """Counts rows that are in a compacted file. If its index cannot be read, the check of that file says so."""
    try:
        rows = part.copies.rows(store, copy)
    except (NotFound, OutputError):
        return
    checked.count(copy.file.index_key, shown(part, rows))


def _doubled_ids(store: Store, ids: list[tuple[str, np.ndarray]]) -> list[Problem]:
    """Ids that occur twice. Candidates are found by hash; indexes with candidates are read again for the names."""
    if not ids:
        return []
    values, numbers = np.unique(np.concatenate([hashes for _, hashes in ids]), return_counts=True)
    suspects = values[numbers > 1]
    if not suspects.size:
        return []
    where: dict[str, list[str]] = {}
    for index_key, hashes in ids:
        if np.isin(hashes, suspects).any():
            for row in read_index(store.read(index_key))[0]:
                where.setdefault(row.id, []).append(index_key)
    doubled = {name: keys for name, keys in where.items() if len(keys) > 1}
    listed = [Problem(keys[0], f"id {name} also in {keys[1]}", "each id once") for name, keys in doubled.items()]
    if (rest := len(listed) - LISTED_IDS) > 0:
        listed[LISTED_IDS:] = [Problem(DATA, f"{rest} more ids that occur twice", "each id once")]
    return listed

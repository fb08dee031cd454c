"""Verification of an output: compares files with their receipts (sizes, hashes, counts, offsets).

Takes a store, returns a `VerifyReport` with its problems (file, found, expected). `deep` reads all bytes once, in pieces; without it only
receipts, sizes, indexes and footers are read. Files that no receipt names are a notice, not a problem.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import InputError, NotFound, OutputError, SourceChanged
from pipeline.format.index import read_footer, read_index
from pipeline.format.layout import DATA, DELTA_LOG, TAKEDOWNS, is_foreign_cache
from pipeline.format.tensors import STORAGE_TYPES, SpanChecker
from pipeline.ledger.counted import shown
from pipeline.ledger.latent_set import layout_by_names
from pipeline.ledger.manifest import written_file
from pipeline.ledger.overlaps import CountedReceipt, Overlaps
from pipeline.ledger.receipts import Ledger, imbalances
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import NONE, may_be_deleted, read_takedowns
from pipeline.operate.row_checks import doubled_ids, id_hashes, misplaced_variant
from pipeline.records import FORMAT_VERSIONS, variant_names
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.format.index import IndexRow
    from pipeline.format.layout import Layout
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import WrittenFile
    from pipeline.storage import ObjectInfo, Store

    Visible = Callable[[list[IndexRow]], list[IndexRow]]

PIECE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference between found and expected."""

    file: str
    found: str
    expected: str


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


class _Part(NamedTuple):
    """What is known of the receipt of a file."""

    visible: Visible
    fingerprint: str
    shard_id: str
    takedowns: Takedowns
    variants: tuple[str, ...]  # of each clip


@dataclass(slots=True)
class _Checked:
    """Result of checking one shard. `rows` and `frames` are those that count."""

    part: CountedReceipt | None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    rows: int = 0
    frames: int = 0
    ids: list[tuple[str, np.ndarray]] = field(default_factory=list)  # (index key, uint64 hash of each id)
    bytes_read: int = 0
    deleted: int = 0  # files that are gone and may be: all sources of their receipt are taken down


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
    _check_published(store, report)
    takedowns = _takedowns(store, report)
    # Listed before receipts: see `receipts.orphans`.
    stored = [info for prefix in (DATA, layout.index) for info in store.list(prefix)]
    foreign = [info.key for info in store.list(layout.receipts) if not layout.receipt_name(info.key)]
    report.notices += [f"{key}: not a receipt's name" for key in foreign]
    named: set[str] = set()
    deleted = 0
    ids: list[tuple[str, np.ndarray]] = []
    for checked in _check_shards(store, ledger, report, takedowns, workers):
        deleted += checked.deleted
        report.problems += checked.problems
        report.notices += checked.notices
        report.bytes_read += checked.bytes_read
        ids += checked.ids
        if checked.part is not None:
            report.shards += 1
            files = checked.part.receipt.files
            named |= {key for item in files for key in (item.key, item.index_key)}
            report.files += len(files)
            report.rows += checked.rows
            report.frames += checked.frames
    _note_deleted(report, deleted)
    report.problems += [Problem(*found) for found in doubled_ids(store, ids)]
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
        report.problems.append(Problem(f"snapshot {number}", str(error), "its record and tables as published"))
        return
    report.shards = len({row["shard_id"] for row in files})
    report.files = len(files)
    ids: list[tuple[str, np.ndarray]] = []
    variants = {name: variant_names(item.parts) for name, item in snapshot.fingerprints.items()}

    def check(row: dict[str, Any]) -> _Checked:
        checked = _Checked(None)
        hidden = set(row["hidden"])
        item = written_file(row)

        def visible(rows: list[IndexRow]) -> list[IndexRow]:
            return [found for found in rows if found.row not in hidden and not takedowns.hides(found)]

        facts = _Part(visible, row["fingerprint"], row["shard_id"], takedowns, variants[row["fingerprint"]])
        _check_file(store, item, facts, report.deep, checked)
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
    report.problems += [Problem(*found) for found in doubled_ids(store, ids)]


def _takedowns(store: Store, report: VerifyReport) -> Takedowns:
    """All takedowns; none if one cannot be read, which is reported."""
    try:
        return read_takedowns(store)
    except OutputError as error:
        report.problems.append(Problem(TAKEDOWNS, error.message, "records of takedowns that can be read"))
        return NONE


def _check_published(store: Store, report: VerifyReport) -> None:
    """Reads the record and all tables of every snapshot. One that a later snapshot passed over is a notice."""
    snapshots = Snapshots(store)
    passed_over: set[int] = set()
    for number in reversed(snapshots.numbers()):
        try:
            passed_over.update(snapshots.whole(number).passed_over)
        except OutputError as error:
            if number in passed_over:
                report.notices.append(f"snapshot {number} is damaged, a later one passed over it: {error.message}")
            else:
                report.problems.append(
                    Problem(f"snapshot {number}", error.message, "its record and tables as published")
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
            "of a running build, or left by a killed one"
        )


def _overlaps(store: Store, layout: Layout, takedowns: Takedowns) -> Overlaps:
    """Which receipt counts for which source. Empty if a receipt has another format version, which is reported elsewhere."""
    try:
        return Overlaps(Summaries(store, layout=layout).all(), takedowns)
    except OutputError:
        return Overlaps([])


def _check_shards(
    store: Store, ledger: Ledger, report: VerifyReport, takedowns: Takedowns, workers: int
) -> Iterator[_Checked]:
    overlaps = _overlaps(store, ledger.layout, takedowns)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        pending: deque[Any] = deque()
        for shard_id, keys in ledger.keys_by_shard().items():
            if len(keys) > 1:
                report.notices.append(
                    f"shard {shard_id} has {len(keys)} receipts; the earliest that is complete counts"
                )
            pending.append(pool.submit(_check_shard, store, ledger, keys, overlaps, report.deep))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _check_shard(store: Store, ledger: Ledger, keys: list[str], overlaps: Overlaps, deep: bool) -> _Checked:
    try:
        receipt = ledger.load_first(keys)
    except OutputError as error:
        return _Checked(None, [Problem(keys[0], error.message, "a receipt of this format")])
    if receipt is None:
        found = "an empty or cut-off receipt: its shard counts as not done"
        return _Checked(None, [Problem(keys[0], found, "complete JSON; run the build again")])
    part = overlaps.counted(receipt)
    checked = _Checked(part)
    if elsewhere := len(part.hidden_uris) or len(part.hidden_samples):
        checked.notices.append(f"{keys[0]}: {elsewhere} inputs count in another receipt; their rows here are hidden")
    checked.problems += [Problem(keys[0], text, "counts that add up") for text in imbalances(receipt)]
    if (expected := receipt.shard.id(receipt.fingerprint)) != receipt.shard_id:
        checked.problems.append(
            Problem(keys[0], f"shard id {receipt.shard_id}", f"{expected} from its sources and fingerprint")
        )
    for item in receipt.files:
        names = variant_names(receipt.fingerprint_parts)
        facts = _Part(lambda rows: shown(part, rows), receipt.fingerprint, receipt.shard_id, part.takedowns, names)
        _check_file(store, item, facts, deep, checked)
    return checked


def _check_file(store: Store, item: WrittenFile, part: _Part, deep: bool, checked: _Checked) -> None:
    infos: dict[str, ObjectInfo] = {}
    for key, size in ((item.key, item.num_bytes), (item.index_key, item.index_bytes)):
        try:
            infos[key] = store.stat(key)
        except NotFound:
            if may_be_deleted(store, part.takedowns, part.shard_id):
                checked.deleted += 1
            else:
                checked.problems.append(Problem(key, "no such file", f"{size} bytes"))
            continue
        if infos[key].size != size:
            checked.problems.append(Problem(key, f"{infos[key].size} bytes", f"{size} bytes"))
    rows = _check_index(store, item, part.visible, checked) if item.index_key in infos else []
    if (misplaced := misplaced_variant(rows, part.variants)) is not None:
        checked.problems.append(Problem(item.index_key, *misplaced))
    if item.key not in infos:
        return
    if deep:
        _check_bytes(store, item, infos[item.key], rows, checked)
    if item.key.endswith(".parquet"):
        _check_footer(store, item, infos[item.key], part.fingerprint, checked)


def _check_index(store: Store, item: WrittenFile, visible: Visible, checked: _Checked) -> list[IndexRow]:
    data = store.read(item.index_key)
    checked.bytes_read += len(data)
    if (found := hashlib.sha256(data).hexdigest()) != item.index_sha256:
        checked.problems.append(Problem(item.index_key, f"sha256 {found}", f"sha256 {item.index_sha256}"))
        return []
    try:
        rows, metadata = read_index(data)
    except (ValueError, OSError) as error:
        checked.problems.append(Problem(item.index_key, str(error), "a side index"))
        return []
    facts = {
        "rows": (len(rows), item.rows),
        "frames": (sum(row.num_frames for row in rows), item.frames),
        "buckets": ({row.bucket for row in rows}, {item.bucket}),
        "data file": (metadata.get("data"), {"key": item.key, "num_bytes": item.num_bytes, "sha256": item.sha256}),
    }
    for name, (got, expected) in facts.items():
        if got != expected:
            checked.problems.append(Problem(item.index_key, f"{name}: {got}", f"{expected}"))
    for position, row in enumerate(rows):
        if (got := (row.row, row.latent_length)) != (expected := (position, _length(row))):
            where = f"{item.index_key}#{row.id}"
            checked.problems.append(Problem(where, f"row and bytes {got}", f"{expected} from its position and shape"))
    counted = visible(rows)
    checked.rows += len(counted)
    checked.frames += sum(row.num_frames for row in counted)
    checked.ids.append((item.index_key, id_hashes(counted)))
    return rows


def _length(row: IndexRow) -> int:
    return math.prod(row.shape) * STORAGE_TYPES[row.dtype].num_bytes


def _check_bytes(store: Store, item: WrittenFile, info: ObjectInfo, rows: list[IndexRow], checked: _Checked) -> None:
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=True)
    try:
        with store.open_stream(item.key, size=info.size, etag=info.etag) as stream:
            while piece := stream.read(PIECE_BYTES):
                checker.feed(piece)
    except SourceChanged as error:
        checked.problems.append(Problem(item.key, error.message, "a file that does not change"))
        return
    checked.bytes_read += checker.num_bytes
    if (found := checker.finish()) != item.sha256:
        checked.problems.append(Problem(item.key, f"sha256 {found}", f"sha256 {item.sha256}"))
    checked.problems += [Problem(f"{item.key}#{bad.id}", bad.found, bad.expected) for bad in checker.problems]


def _check_footer(store: Store, item: WrittenFile, info: ObjectInfo, fingerprint: str, checked: _Checked) -> None:
    try:
        footer, metadata = read_footer(RangedFile(store, item.key, info.size), item.key)
    except InputError as error:
        checked.problems.append(Problem(item.key, error.message, "a Parquet file"))
        return
    if footer.num_rows != item.rows:
        checked.problems.append(Problem(item.key, f"{footer.num_rows} rows", f"{item.rows} rows"))
    if (found := (metadata or {}).get("fingerprint")) != fingerprint:
        checked.problems.append(Problem(item.key, f"fingerprint {found}", f"fingerprint {fingerprint}"))

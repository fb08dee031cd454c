"""Removal of tensors that no row needs any more: of captions and rows that were taken down, replaced, or left out of the newest snapshot.

Files with such tensors are written again without them, and the next version names the new ones. The old files stay for the grace time, for
readers of older versions; a later run deletes them, with the versions that name them. A run that was killed is finished by the next.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger.snapshots import Snapshots
from pipeline.loader.captions import CaptionRule
from pipeline.loader.dataset import LatentDataset
from pipeline.process.scratch import ScratchFolder
from pipeline.sidecars.description import read_set
from pipeline.sidecars.file_index import packed_array, unpacked_keys
from pipeline.sidecars.names import (
    BY_CAPTION,
    check_set_name,
    data_prefix,
    key_of,
    receipts_prefix,
    unit_of,
    unit_of_receipt,
    version_key,
)
from pipeline.sidecars.reading import Position, SidecarReader
from pipeline.sidecars.receipts import SidecarReceipts
from pipeline.sidecars.storing import store_unit
from pipeline.sidecars.versions import SetVersions
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.sidecars.receipts import SidecarReceipt
    from pipeline.storage import Store

GRACE_S = 48 * 3600.0


@dataclass(slots=True)
class PruneReport:
    """What a run did. `pruned`: rows that nothing needs; `waiting`: old files that a later run deletes; `deleted`: those gone now."""

    name: str
    output: str
    version: int = 0
    rows: int = 0
    pruned: int = 0
    rewritten: int = 0  # files
    waiting: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    versions_deleted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def prune(
    store: Store, name: str, storage: StorageConfig, *, grace_s: float = GRACE_S, dry_run: bool = False
) -> PruneReport:
    """Removes what no row of the newest snapshot needs from set `name`.

    Raises:
        InputError: no such set; nothing is published.
        OutputError: an object of the set or of the output that cannot be read.
    """
    described = read_set(store, check_set_name(name))
    versions = SetVersions(store, name)
    if not dry_run:
        versions.publish()  # receipts that no version names are part of the set
    reader = SidecarReader(store, name)
    report = PruneReport(name, store.root, reader.number)
    needed = _needed(store, storage, by_caption=described.key == BY_CAPTION, sources=_sources(versions))
    table = versions.files(reader.version)
    instead: dict[str, SidecarReceipt | None] = {}
    for number, row in enumerate(table.to_pylist()):
        keys = packed_array(unpacked_keys(row["keys"]))
        shown = np.setdiff1d(np.arange(len(keys)), row["hidden"]).tolist()
        kept = [place for place in shown if keys[place] in needed]
        report.pruned += len(shown) - len(kept)
        # Hidden rows, too: without the file that hides them they would count.
        if needed.issuperset(keys):
            continue
        report.rewritten += 1
        if not dry_run:
            instead[row["unit"]] = _rewritten(store, reader, number, row, [(place, keys[place]) for place in kept])
    report.rows = reader.version.rows - report.pruned
    if dry_run:
        return report
    if instead:
        _delete_receipts(store, name, set(instead))
        report.version = versions.publish_without(instead).number
    _delete_old(store, name, grace_s, report)
    return report


def _sources(versions: SetVersions) -> tuple[str, ...]:
    """Sources of captions that were ever embedded, and the first caption."""
    found = {"caption"}
    for version in map(versions.read, versions.numbers()):
        found.update(version.captions, *(one.captions for one in version.covers))
    return tuple(sorted(found))


def _needed(store: Store, storage: StorageConfig, *, by_caption: bool, sources: tuple[str, ...]) -> set[bytes]:
    """Keys that visible rows of the newest snapshot need, of all fingerprints."""
    snapshot = Snapshots(store).get(None)
    rule = CaptionRule(sources)
    found = {key_of("")} if by_caption else set()
    for fingerprint in snapshot.fingerprints:
        columns = rule.columns if by_caption else ()
        dataset = LatentDataset.open(
            store.root, snapshot.number, columns=columns, fingerprint=fingerprint, storage=storage
        )
        try:
            for _, _, row in dataset.placed():
                texts = rule.candidates(row.caption, row.columns) if by_caption else [row.id]
                found.update(map(key_of, texts))
        finally:
            dataset.close()
    return found


def _rewritten(
    store: Store, reader: SidecarReader, number: int, row: dict[str, Any], kept: list[tuple[int, bytes]]
) -> SidecarReceipt | None:
    """Receipt of a file with these rows of file `number`; None if there are none."""
    if not kept:
        return None
    described = reader.described
    unit = unit_of(described.fingerprint, [key for _, key in kept])
    if (done := SidecarReceipts(store, described.name).find(unit)) is not None:
        return done  # of a run that was killed
    names = _names(store, row, described.key)

    def rows() -> Iterator[tuple[bytes, str, dict[str, np.ndarray]]]:
        for place, key in kept:
            yield key, names[place], {each: reader.tensor(Position(number, place), each) for each in described.tensors}

    with ScratchFolder() as folder:
        notes = {"pruned_from": row["key"]}
        return store_unit(store, described, unit, secrets.token_hex(8), rows(), folder, notes=notes)


def _names(store: Store, row: dict[str, Any], column: str) -> list[str]:
    """Ids or hashes of captions of the rows of a file."""
    file = pq.ParquetFile(pa.PythonFile(RangedFile(store, row["key"], row["bytes"]), mode="r"))
    names: list[str] = file.read([column], use_threads=False)[column].to_pylist()
    return names


def _delete_receipts(store: Store, name: str, units: set[str]) -> None:
    for key in list(store.keys(receipts_prefix(name))):
        if unit_of_receipt(name, key) in units:
            store.delete(key)


def _delete_old(store: Store, name: str, grace_s: float, report: PruneReport) -> None:
    """Deletes files of the set that neither the newest version nor a receipt names, and versions that name one of them."""
    versions, limit = SetVersions(store, name), time.time() - grace_s
    listed = list(
        store.list(data_prefix(name))
    )  # before the receipts are read: what is committed meanwhile is not among them
    named = {key for one in SidecarReceipts(store, name).all() for key in (one.key, one.index_key)}
    numbers = versions.numbers()
    for row in versions.files(versions.read(numbers[-1])).select(["key", "index_key"]).to_pylist():
        named |= set(row.values())
    unnamed = [info for info in listed if info.key not in named]
    doomed = [info for info in unnamed if info.modified <= limit]
    report.waiting = sum(info.key.endswith(".sidecar") for info in unnamed) - sum(
        info.key.endswith(".sidecar") for info in doomed
    )
    gone = {info.key for info in doomed}
    for number in numbers[:-1]:
        version = versions.read(number)
        if gone & set(versions.files(version)["key"].to_pylist()):
            store.delete(version_key(name, number))  # before the files that it names
            store.delete(version.table)
            report.versions_deleted += 1
    for info in doomed:
        store.delete(info.key)
        report.deleted += info.key.endswith(".sidecar")
        report.deleted_bytes += info.size

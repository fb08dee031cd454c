"""Contents of the next snapshot of an output: the parent's tables, plus receipts it does not cover, minus rows that no longer count.

A receipt is read only if the parent does not cover it, or if another part of it counts than in the parent. Statistics of receipts stay in
files on the local disk, so that memory is a few hundred bytes per receipt besides the summaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger.counted import Share, shares
from pipeline.ledger.manifest import (
    FILES,
    RECEIPTS,
    ROWS_AT_ONCE,
    TableSpool,
    file_row,
    read_choices,
    receipt_row,
    sorted_by,
)
from pipeline.ledger.overlaps import CountedReceipt, Overlaps, whole_state
from pipeline.ledger.receipts import Ledger, imbalances
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns
from pipeline.ledger.versions import hide_other_versions, select_versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.versions import Selection
    from pipeline.records import Counts, Receipt, SourceObject
    from pipeline.storage import Store

LIGHT = [name for name in RECEIPTS.names if name != "stats"]


@dataclass(slots=True)
class Candidate:
    """A snapshot that is not checked yet."""

    parent: Snapshot | None
    parent_files: pa.Table
    overlaps: Overlaps
    selection: Selection
    files: pa.Table  # `manifest.FILES`, by key
    receipts: pa.Table  # `manifest.RECEIPTS` without statistics
    receipts_path: Path  # all columns of `manifest.RECEIPTS`, as Parquet
    fresh: set[str]  # shards that the parent does not cover
    unchanged: bool  # against the parent
    cut_off: list[str]  # shards whose only receipt is empty or cut off
    keys: dict[str, str]  # of receipts, by shard id

    def fresh_parts(self, store: Store, most: int) -> list[CountedReceipt]:
        """Up to `most` receipts with rows that the parent does not cover, evenly spread over shards; if it covers all, of all receipts."""
        shards = sorted(set(self.files["shard_id"].unique().to_pylist()))
        offered = [shard for shard in shards if shard in self.fresh] or shards
        chosen = offered if len(offered) <= most else [offered[i * len(offered) // most] for i in range(most)]
        read = Ledger(store).read_all([self.keys[shard]] for shard in chosen)
        return [self.overlaps.counted(receipt) for receipt in read if receipt is not None]


class _Pool:
    """Rows of receipts that were read, in two files; each receipt with its `Overlaps.state`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files = TableSpool(FILES, folder / f"{name}-files")
        self._receipts = TableSpool(RECEIPTS, folder / f"{name}-receipts")

    def add_whole(self, receipt: Receipt) -> None:
        """Adds a receipt of which all rows count."""
        found = [Share(item, item.rows, item.frames, item.num_bytes) for item in receipt.files]
        self._add(CountedReceipt(receipt), receipt.added(), found, whole_state(receipt.attempt))

    def add(self, store: Store, part: CountedReceipt, state: bytes) -> None:
        """Adds a receipt with the part that counts; reads its indexes if some rows do not count."""
        self._add(part, *shares(store, part), state)

    def _add(self, part: CountedReceipt, counts: Counts, found: list[Share], state: bytes) -> None:
        problem = next(iter(imbalances(part.receipt)), None)
        self._receipts.add(receipt_row(part, counts, state, problem))
        for share in found:
            if share.rows:
                self._files.add(file_row(part, share))

    def finish(self) -> tuple[pa.Table, Path]:
        """Files as a table, receipts as a Parquet file."""
        return pq.read_table(self._files.finish()), self._receipts.finish()


def gather(
    store: Store,
    parent: Snapshot | None,
    folder: Path,
    *,
    fingerprint: str | None = None,
    listing: Sequence[SourceObject] | None = None,
    drop_missing: bool = False,
    save: bool = False,
    workers: int = 8,
) -> Candidate:
    """Reads what is new and decides what counts.

    Args:
        store: the output.
        parent: its newest snapshot.
        folder: local scratch folder; the candidate refers to files in it.
        fingerprint: only receipts of fingerprints with this prefix; None: all.
        listing: the inputs as they are now, if known.
        drop_missing: whether inputs that are not in `listing` are dropped.
        save: whether to cache the summaries of receipts that were read, in the output.
        workers: threads that read receipts.

    Raises:
        OutputError: a receipt or takedown that cannot be read.
    """
    snapshots = Snapshots(store)
    covered: set[str] = set()
    if parent is not None:
        parent_receipts = snapshots.download(parent, "receipts", folder / "parent-receipts")
        covered.update(pq.read_table(parent_receipts, columns=["shard_id"])["shard_id"].to_pylist())
    pool = _Pool(folder, "read")

    def keep(receipt: Receipt) -> None:
        if receipt.shard_id not in covered and receipt.fingerprint.startswith(fingerprint or ""):
            pool.add_whole(receipt)

    summaries = Summaries(store, workers)
    found = [item for item in summaries.all(keep) if item.fingerprint.startswith(fingerprint or "")]
    if save:
        summaries.save()
    cut_off = summaries.cut_off
    overlaps = Overlaps(found, read_takedowns(store))
    del summaries, found
    before = read_choices(snapshots.table(parent, "choices")) if parent is not None else {}
    selection = select_versions(overlaps, covered, before, listing, drop_missing=drop_missing)
    hide_other_versions(overlaps, selection.versions)
    wanted = {item.shard_id: overlaps.state(item) for item in overlaps.by_shard.values()}
    keys = {item.shard_id: item.key for item in overlaps.by_shard.values()}
    overlaps.forget_summaries()  # before tables of the same number of rows are read
    parent_files, sources = FILES.empty_table(), [pool.finish()]
    if parent is not None:
        parent_files = snapshots.table(parent, "files")
        sources.insert(0, (parent_files, parent_receipts))
    files, receipts_path, taken = _combined(store, overlaps, wanted, keys, sources, folder, workers)
    return Candidate(
        parent=parent,
        parent_files=parent_files,
        overlaps=overlaps,
        selection=selection,
        files=files,
        receipts=pq.read_table(receipts_path, columns=LIGHT),
        receipts_path=receipts_path,
        fresh={shard for shard in keys if shard not in covered},
        unchanged=parent is not None and taken == [len(covered), *([0] * (len(taken) - 1))],
        cut_off=cut_off,
        keys=keys,
    )


def _combined(
    store: Store,
    overlaps: Overlaps,
    wanted: dict[str, bytes],
    keys: dict[str, str],
    sources: list[tuple[pa.Table, Path]],
    folder: Path,
    workers: int,
) -> tuple[pa.Table, Path, list[int]]:
    """Files and receipts of all shards, and the number of receipts from each source. Rows with an outdated state are read again.

    Empties `wanted` (the state by shard) and `sources`.
    """
    tables, taken = [], []
    path = folder / "receipts"
    with pq.ParquetWriter(path, RECEIPTS, compression="zstd", write_page_checksum=True) as out:

        def take(files: pa.Table, receipts: Path) -> None:
            kept, outdated = 0, []
            for batch in pq.ParquetFile(receipts).iter_batches(ROWS_AT_ONCE):
                shards, states = batch["shard_id"].to_pylist(), batch["state"].to_pylist()
                valid = []
                for shard, state in zip(shards, states, strict=True):
                    valid.append(wanted.get(shard) == state)
                    if valid[-1]:
                        del wanted[shard]
                    else:
                        outdated.append(shard)
                kept += sum(valid)
                out.write_batch(batch if all(valid) else batch.filter(pa.array(valid, pa.bool_())))
            if outdated:
                files = files.filter(pc.invert(pc.is_in(files["shard_id"], pa.array(outdated, pa.string()))))
            tables.append(files)
            taken.append(kept)

        while sources:
            take(*sources.pop(0))
        take(*_read_now(store, overlaps, dict(wanted), keys, folder, workers))
    files = pa.concat_tables(tables)
    tables.clear()
    return sorted_by(files, "key"), path, taken


def _read_now(
    store: Store, overlaps: Overlaps, wanted: dict[str, bytes], keys: dict[str, str], folder: Path, workers: int
) -> tuple[pa.Table, Path]:
    pool = _Pool(folder, "again")
    read = Ledger(store).read_all(([keys[shard]] for shard in wanted), workers)
    for shard, receipt in zip(wanted, read, strict=True):
        if receipt is not None:
            pool.add(store, overlaps.counted(receipt), wanted[shard])
    return pool.finish()

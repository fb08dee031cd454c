"""What the next snapshot of an output would hold: the parent's tables, plus receipts it does not cover, minus rows that no longer count.

A receipt is read only if the parent does not cover it, or if another part of it counts than in the parent. Memory is a few hundred bytes a
receipt beside the summaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.counted import Share, shares
from pipeline.ledger.manifest import FILES, RECEIPTS, TableBuilder, file_row, read_choices, receipt_row
from pipeline.ledger.overlaps import CountedReceipt, Overlaps, whole_state
from pipeline.ledger.receipts import Ledger, imbalances
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns
from pipeline.ledger.versions import hide_other_versions, select_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.summaries import ReceiptSummary
    from pipeline.ledger.versions import Selection
    from pipeline.records import Receipt, SourceObject
    from pipeline.storage import Store


@dataclass(slots=True)
class Candidate:
    """A snapshot that is not checked yet."""

    parent: Snapshot | None
    parent_files: pa.Table
    overlaps: Overlaps
    selection: Selection
    files: pa.Table  # `manifest.FILES`, by key
    receipts: pa.Table  # `manifest.RECEIPTS`, by shard id
    fresh: set[str]  # shards that the parent does not cover
    cut_off: list[str]  # shards whose only receipt is empty or cut off
    save_summaries: Callable[[], None]  # caches what had to be read

    def fresh_parts(self, store: Store, most: int) -> list[CountedReceipt]:
        """Up to `most` receipts with rows that the parent does not cover, evenly spread over their shards; else of all receipts."""
        shards = sorted(set(self.files["shard_id"].unique().to_pylist()))
        offered = [shard for shard in shards if shard in self.fresh] or shards
        chosen = offered if len(offered) <= most else [offered[i * len(offered) // most] for i in range(most)]
        read = Ledger(store).read_all([self.overlaps.by_shard[shard].key] for shard in chosen)
        return [self.overlaps.counted(receipt) for receipt in read if receipt is not None]


class _Pool:
    """Rows of receipts as they were read, each with the state that it was counted in."""

    def __init__(self) -> None:
        self._files, self._receipts = TableBuilder(FILES), TableBuilder(RECEIPTS)

    def add_whole(self, receipt: Receipt) -> None:
        """A receipt of which all rows count."""
        found = [Share(item, item.rows, item.frames, item.num_bytes) for item in receipt.files]
        self._add(CountedReceipt(receipt), receipt.added(), found, whole_state(receipt.attempt))

    def add(self, store: Store, part: CountedReceipt, state: bytes) -> None:
        """A receipt with the part of it that counts; reads its indexes where that is not the whole."""
        self._add(part, *shares(store, part), state)

    def _add(self, part: CountedReceipt, counts, found: list[Share], state: bytes) -> None:  # type: ignore[no-untyped-def]
        problem = next(iter(imbalances(part.receipt)), None)
        self._receipts.add(receipt_row(part, counts, state, problem))
        for share in found:
            if share.rows:
                self._files.add(file_row(part, share))

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """(files, receipts)."""
        return self._files.table(), self._receipts.table()


def gather(
    store: Store,
    parent: Snapshot | None,
    *,
    fingerprint: str | None = None,
    listing: Sequence[SourceObject] | None = None,
    drop_missing: bool = False,
    workers: int = 8,
) -> Candidate:
    """Reads what is new and decides what counts.

    Args:
        store: the output.
        parent: its newest snapshot.
        fingerprint: only receipts of fingerprints that begin so; None: all.
        listing: the inputs as they are now, if known.
        drop_missing: whether inputs that are not in `listing` are dropped.
        workers: threads that read receipts.

    Raises:
        OutputError: a receipt or takedown that cannot be read.
    """
    snapshots = Snapshots(store)
    empty = (FILES.empty_table(), RECEIPTS.empty_table())
    parent_files, parent_receipts = (
        (snapshots.table(parent, "files"), snapshots.table(parent, "receipts")) if parent is not None else empty
    )
    covered = set(parent_receipts["shard_id"].to_pylist())
    pool = _Pool()

    def keep(receipt: Receipt) -> None:
        if receipt.shard_id not in covered and receipt.fingerprint.startswith(fingerprint or ""):
            pool.add_whole(receipt)

    summaries = Summaries(store, workers)
    found = [item for item in summaries.all(keep) if item.fingerprint.startswith(fingerprint or "")]
    overlaps = Overlaps(found, read_takedowns(store))
    before = read_choices(snapshots.table(parent, "choices")) if parent is not None else {}
    selection = select_versions(overlaps, covered, before, listing, drop_missing=drop_missing)
    hide_other_versions(overlaps, selection.versions)
    files, receipts = _combined(store, overlaps, (parent_files, parent_receipts), pool.tables(), workers)
    return Candidate(
        parent=parent,
        parent_files=parent_files,
        overlaps=overlaps,
        selection=selection,
        files=files,
        receipts=receipts,
        fresh={shard for shard in overlaps.by_shard if shard not in covered},
        cut_off=summaries.cut_off,
        save_summaries=summaries.save,
    )


def _combined(
    store: Store, overlaps: Overlaps, parent: tuple[pa.Table, pa.Table], read: tuple[pa.Table, pa.Table], workers: int
) -> tuple[pa.Table, pa.Table]:
    """Files and receipts of all shards: rows in `parent` and `read` whose state still holds, and the others read now."""
    wanted = {item.shard_id: overlaps.state(item) for item in overlaps.by_shard.values()}
    tables: list[tuple[pa.Table, pa.Table]] = []
    for files, receipts in (parent, read):
        valid = []
        for shard, state in zip(receipts["shard_id"].to_pylist(), receipts["state"].to_pylist(), strict=True):
            valid.append(wanted.get(shard) == state)
            if valid[-1]:
                del wanted[shard]
        mask = pa.array(valid, pa.bool_())
        if all(valid):
            tables.append((files, receipts))
            continue
        kept = receipts.filter(mask)
        tables.append((files.filter(pc.is_in(files["shard_id"], kept["shard_id"].combine_chunks())), kept))
    tables.append(_read_now(store, overlaps, wanted, workers))
    files, receipts = (pa.concat_tables([table[side] for table in tables]) for side in (0, 1))
    return files.sort_by("key"), receipts.sort_by("shard_id")


def _read_now(store: Store, overlaps: Overlaps, wanted: dict[str, bytes], workers: int) -> tuple[pa.Table, pa.Table]:
    pool = _Pool()
    items: list[ReceiptSummary] = [overlaps.by_shard[shard] for shard in wanted]
    read = Ledger(store).read_all(([item.key] for item in items), workers)
    for item, receipt in zip(items, read, strict=True):
        if receipt is not None:
            pool.add(store, overlaps.counted(receipt), wanted[item.shard_id])
    return pool.tables()

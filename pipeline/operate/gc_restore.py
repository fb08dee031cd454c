"""Which retired receipts `lathe gc` moves back to `_receipts/`. Takes a store, its newest snapshot, copies and takedowns.

A retired receipt counts again in two cases: a publisher that had read it before it moved shows rows of it, or a build found that an input
has the bytes of its version. None moves back of a shard that was encoded again, and none whose files are deleted: as the earlier receipt it
would count, and its rows would be missing in all later snapshots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.snapshots import Snapshots

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.format.layout import ReceiptName
    from pipeline.ledger.copies import Copies
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import Receipt, WrittenFile
    from pipeline.storage import Store


class RetiredSearch:
    """Search for retired receipts that count again."""

    def __init__(self, store: Store, newest: Snapshot | None, copies: Copies, takedowns: Takedowns) -> None:
        """`newest`: snapshot, None if nothing is published; `copies`: those of it."""
        self._store, self._newest, self._copies, self._takedowns = store, newest, copies, takedowns
        self._counting: set[str] = set()

    def asked(self, shards: Collection[str], same: Collection[str]) -> set[str]:
        """Of the shards of retired receipts, those of which rows count in the newest snapshot, or that are among `same`."""
        wanted = pa.array(sorted(shards), pa.string())
        if self._newest is not None:
            for batch in Snapshots(self._store).batches(self._newest, "receipts", ["shard_id", "clips"]):
                mine = pc.and_(pc.is_in(batch["shard_id"], wanted), pc.greater(batch["clips"], 0))
                self._counting.update(batch["shard_id"].filter(mine).to_pylist())
        return self._counting | (set(same) & set(shards))

    def found(self, read: dict[ReceiptName, Receipt], same: Collection[str]) -> set[ReceiptName]:
        """Of these retired receipts, those that count again. `same`: shards that other receipts name because bytes are equal."""
        shown = self._named_by_newest({key for receipt in read.values() for key in self._data_keys(receipt)})
        return {
            name
            for name, receipt in read.items()
            if (name.shard_id in self._counting and not shown.isdisjoint(self._data_keys(receipt)))
            or (name.shard_id in same and self._is_stored(receipt))
        }

    def _data_keys(self, receipt: Receipt) -> set[str]:
        """Data files that may have rows of a receipt: its own, and those into which they were copied."""
        copied = self._copies.of(receipt.shard_id)
        moved = (copy for item in receipt.files for copy in copied.get(item.key, ()) if copy.rows)
        return {*(item.key for item in receipt.files), *(copy.file.key for copy in moved)}

    def _named_by_newest(self, keys: set[str]) -> set[str]:
        found: set[str] = set()
        if keys and self._newest is not None:
            wanted = pa.array(sorted(keys), pa.string())
            for batch in Snapshots(self._store).batches(self._newest, "files", ["key"]):
                found.update(batch["key"].filter(pc.is_in(batch["key"], wanted)).to_pylist())
        return found

    def _is_stored(self, receipt: Receipt) -> bool:
        """Whether every row of a receipt that no takedown hides can be read: from its own files, or from copies."""
        copied = self._copies.of(receipt.shard_id)
        for item in receipt.files:
            copies = copied.get(item.key, ())
            dropped = any(not self._takedowns.hides(row) for copy in copies for row in copy.dropped)
            places = [copy.file for copy in copies if copy.rows] if copies and not dropped else [item]
            if not all(map(self._is_there, places)):
                return False
        return True

    def _is_there(self, file: WrittenFile) -> bool:
        """Whether a data file and its index are stored, or were deleted because takedowns hide all its rows."""
        if file.index_key in self._takedowns.deleted:
            return True
        return self._store.exists(file.key) and self._store.exists(file.index_key)

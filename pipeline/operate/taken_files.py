"""Data files that hold rows which takedowns hide: of snapshots, and of receipts. Takes a store and a filter of takedowns.

Reads the summaries of receipts, manifests, and the indexes of files of receipts that name a source which a takedown names; each index once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.format.columns import readable_key, storable
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.row_search import IndexedFile, RowSearch
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import URI_BYTES, uri_id
from pipeline.ledger.summary_tables import rows_naming
from pipeline.ledger.takedowns import NONE, Takedowns
from pipeline.process.scratch import ScratchFolder
from pipeline.records import split_id
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.format.index import IndexRow
    from pipeline.records import Receipt, WrittenFile
    from pipeline.storage import Store

WORKERS = 8  # threads on a remote store
COLUMNS = ["key", "index_key", "shard_id", "hidden"]


@dataclass(frozen=True, slots=True)
class TakenFile:
    """A data file with the positions of rows that takedowns hide; None: its index is lost or damaged, so that they are not known."""

    key: str
    index_key: str
    taken: frozenset[int] | None
    rows: int  # in the file; 0 if they are not known
    records: frozenset[str] = frozenset()  # takedowns that hide these rows, by key; if they are not known, all that may


class TakenFiles:
    """Files with rows that `takedowns` hide and `earlier` ones do not."""

    def __init__(self, store: Store, takedowns: Takedowns, earlier: Takedowns = NONE) -> None:
        self._store, self._takedowns, self._earlier = store, takedowns, earlier
        self._workers = WORKERS if is_remote(store.root) else 1
        # By index key: positions, number of rows, takedowns.
        self._known: dict[str, tuple[frozenset[int] | None, int, frozenset[str]]] = {}
        self._search = RowSearch(store)
        self._records: dict[str, frozenset[str]] = {}  # by shard: takedowns that name one of its sources
        self._keys = self._touched()
        self._shards = pa.array(sorted(set(self._keys.values())), pa.string())

    def rows_of_snapshot(self, number: int) -> int:
        """Rows that the snapshot would show without these takedowns. Files whose index cannot be read count as 0."""
        return sum(len((file.taken or frozenset()) - hidden) for file, hidden in self.of_snapshot(number))

    @cached_property
    def _each(self) -> dict[str, Takedowns]:
        return {record.key: Takedowns([record]) for record in self._takedowns.records}

    def of_snapshot(self, number: int) -> Iterator[tuple[TakenFile, frozenset[int]]]:
        """Files of a snapshot with such rows, each with the positions that the snapshot hides itself.

        Raises:
            InputError, OutputError: no such snapshot, or one that is damaged.
        """
        if not self._keys:
            return
        snapshots = Snapshots(self._store)
        compacted = pa.array(published_copies(self._store, number).places(self._shards), pa.string())
        for batch in snapshots.batches(snapshots.read(number), "files", COLUMNS):
            mine = pc.or_(pc.is_in(batch["shard_id"], self._shards), pc.is_in(batch["key"], compacted))
            rows = batch.filter(mine).to_pylist()
            named = ((row["key"], row["index_key"], row["shard_id"]) for row in rows)
            for row, file in zip(rows, self._files(named), strict=True):
                if file.taken is None or file.taken:
                    yield file, frozenset(row["hidden"])

    def stored(self) -> Iterator[TakenFile]:
        """Files that receipts name, and those into which compactions copied their rows, each once. Without those that do not exist."""
        copies = published_copies(self._store)
        named = {(item.key, item.index_key, receipt.shard_id) for receipt in self._receipts() for item in receipt.files}
        named |= {(key, str(copies.files[key]["index_key"]), "") for key in copies.places(self._shards)}
        for file in self._files(iter(sorted(named))):
            if (file.taken is None or file.taken) and self._store.exists(file.key):
                yield file

    def lost(self) -> str | None:
        """Key of a file that is gone and that would be needed to show these rows again; None if there is none.

        Of a file whose index is gone as well, only the least and greatest id are known: it counts as lost if it can have held such a row.
        """
        copies = published_copies(self._store)
        for receipt in self._receipts():
            copied = copies.of(receipt.shard_id)
            for item in receipt.files:
                copies_of = copied.get(item.key, ())
                needed = {copy.file.key: copy.file.index_key for copy in copies_of if copy.rows}
                if not copies_of or any(self._takedowns.hides(row) for copy in copies_of for row in copy.dropped):
                    needed[item.key] = item.index_key
                for file in self._files((*keys, receipt.shard_id) for keys in needed.items()):
                    unknown = file.taken is None and (bool(copies_of) or self._may_have_held(receipt, item))
                    if unknown or (file.taken and not self._store.exists(file.key)):
                        return file.key
        return None

    def _may_have_held(self, receipt: Receipt, item: WrittenFile) -> bool:
        """Whether a file of a receipt, whose index is gone, can have held such a row."""
        low, high = item.ranges.get("id", ("", ""))
        mine = {storable(source.uri) for source in receipt.shard.objects}
        if any(map(self._takedowns.takes, mine)) or not self._search.ids_begin_with_keys():
            return True
        records = self._takedowns.records
        keys = {readable_key(key) for record in records for uri, key in record.samples if storable(uri) in mine}
        ids = {split_id(row.id)[0] for record in records for row in record.rows if row.source_uri in mine}
        return IndexedFile(item.index_key, receipt.shard_id, low, high).may_hold(
            sorted({*(f"{key}-" for key in keys), *ids})
        )

    def _receipts(self) -> Iterator[Receipt]:
        read = Ledger(self._store).read_all(([key] for key in sorted(self._keys)), self._workers)
        return (receipt for receipt in read if receipt is not None)

    def _files(self, keys: Iterator[tuple[str, str, str]]) -> Iterator[TakenFile]:
        """Files by key, key of the index, and shard."""
        yield from mapped_ahead(self._file, keys, self._workers, "takedowns")

    def _file(self, keys: tuple[str, str, str]) -> TakenFile:
        key, index_key, shard = keys
        if index_key not in self._known:
            self._known[index_key] = self._read(index_key, shard)
        return TakenFile(key, index_key, *self._known[index_key])

    def _read(self, index_key: str, shard: str) -> tuple[frozenset[int] | None, int, frozenset[str]]:
        try:
            rows = stored_index(self._store, index_key)
        except (NotFound, OutputError):
            return None, 0, self._records.get(shard, frozenset(self._each))  # a compacted file has rows of any shard
        taken = [row for row in rows if self._takedowns.hides(row) and not self._earlier.hides(row)]
        records = {key for row in taken for key in self._hiding(row)}
        return frozenset(row.row for row in taken), len(rows), frozenset(records)

    def _hiding(self, row: IndexRow) -> Iterator[str]:
        keys = self._takedowns.keys_for([uri_id(row.source_uri)])
        return (key for key in keys if self._each[key].hides(row))

    def _touched(self) -> dict[str, str]:
        """Receipts that name such a source: shard by key."""
        wanted = self._takedowns.uri_ids()
        if not wanted:
            return {}
        with ScratchFolder() as folder:
            path = Summaries(self._store).spool(folder / "summaries")
            table = read_table(path, ["shard_id", "key", "uris"])
        found = table.take(pa.array(rows_naming(table, wanted)))
        for shard, named in zip(found["shard_id"].to_pylist(), found["uris"].to_pylist(), strict=True):
            ids = [named[at : at + URI_BYTES] for at in range(0, len(named), URI_BYTES)]
            self._records[shard] = self._records.get(shard, frozenset()) | {*self._takedowns.keys_for(ids)}
        return dict(zip(found["key"].to_pylist(), found["shard_id"].to_pylist(), strict=True))

"""Search of rows by id or by the key of their sample, in the side indexes of an output.

An id begins with the readable part of the sample's key, and the least and greatest id of every file is recorded. So only indexes of files
are read in which the name can lie: of the newest snapshot and of receipts that it does not cover, then of older snapshots; an id is not
looked for any more once it is found. Where ids follow another rule, a key is looked for in all indexes.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, NotFound, OutputError
from pipeline.format.columns import readable_key, storable
from pipeline.format.layout import snapshot_key
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from pipeline.storage import Store

COLUMNS = ["id", "source_uri", "source_key"]
WORKERS = 16  # threads on a remote store
TRIED = 8  # files that show by which rule ids are made


class FoundRow(NamedTuple):
    """A row of an index. Texts as in rows."""

    id: str
    source_uri: str
    source_key: str


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """An index with the least and greatest id in it; empty texts if they are not known."""

    index_key: str
    shard_id: str
    low: str = ""
    high: str = ""

    def may_hold(self, starts: list[str]) -> bool:
        """Whether an id can be in the file that begins with one of `starts`, which are sorted."""
        if not self.high:
            return True
        at = bisect_left(starts, self.low)
        if at < len(starts) and starts[at] <= self.high:
            return True
        return any(_holds(starts, self.low[:length]) for length in range(1, len(self.low)))


def _holds(ordered: list[str], name: str) -> bool:
    at = bisect_left(ordered, name)
    return at < len(ordered) and ordered[at] == name


def _named(column: str, values: pa.Array, table: pa.Table) -> pa.Array:
    return pc.is_in(table[column], values)


class RowSearch:
    """Search in one output. `unread`: keys of indexes and snapshots that could not be read; files that were taken down may be deleted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._workers = WORKERS if is_remote(store.root) else 1
        self._newest: list[IndexedFile] | None = None
        self.unread: list[str] = []

    def rows(self, ids: Collection[str]) -> list[FoundRow]:
        """The rows with these ids, each once, of those that exist."""
        wanted = {storable(name): storable(name) for name in ids}
        found = self._find("id", wanted)
        return list({row.id: row for row in found}.values())

    def samples(self, keys: Collection[str]) -> set[tuple[str, str]]:
        """(URI, key) of the samples with these keys that have a row."""
        wanted = {storable(key): f"{readable_key(key)}-" for key in keys}
        return {(row.source_uri, row.source_key) for row in self._find("source_key", wanted)}

    def files(self) -> list[IndexedFile]:
        """Files of the newest snapshot, and of receipts that it does not cover."""
        if self._newest is None:
            snapshots = Snapshots(self._store)
            newest = snapshots.latest()
            self._newest = []
            covered: Collection[str] = ()
            if newest is not None:
                self._newest = list(self._of_snapshot(snapshots, newest.number))
                covered = set(snapshots.table(newest, "receipts", ["shard_id"])["shard_id"].to_pylist())
            ledger = Ledger(self._store)
            left = ledger.keys_by_shard(without=covered)
            read = ledger.read_all(left.values(), self._workers)
            for receipt in (receipt for receipt in read if receipt is not None):
                for item in receipt.files:
                    low, high = item.ranges.get("id", ("", ""))
                    self._newest.append(IndexedFile(item.index_key, receipt.shard_id, low, high))
        return self._newest

    def ids_begin_with_keys(self) -> bool:
        """Whether ids are made as builds make them, of the sample's key and a hash, in a few files that are looked into."""
        rows = list(self.near(TRIED))
        return bool(rows) and all(row.id.startswith(f"{readable_key(row.source_key)}-") for row in rows)

    def near(self, most: int) -> Iterator[FoundRow]:
        """Rows of up to `most` indexes, evenly spread."""
        files = self.files()
        chosen = files if len(files) <= most else [files[i * len(files) // most] for i in range(most)]
        yield from self._read(chosen, lambda table: pa.array([True] * len(table)))

    def _find(self, column: str, wanted: dict[str, str]) -> list[FoundRow]:
        """Rows whose `column` is one of the names `wanted`, each with what ids of its rows begin with.

        An id is that of one row, so the search ends when it is found. Samples of several sources may have a key, also in older snapshots.
        """
        left = dict(wanted)
        found: list[FoundRow] = []
        read: set[str] = set()
        for files in self._files_by_snapshot():
            starts = sorted(left.values())
            chosen = [file for file in files if file.may_hold(starts)]
            read.update(file.index_key for file in chosen)
            found += self._read(chosen, partial(_named, column, pa.array(list(left), pa.string())))
            if column == "id":
                for row in found:
                    left.pop(row.id, None)
                if not left:
                    return found
        for row in found:
            left.pop(getattr(row, column), None)
        if left and column != "id" and not self.ids_begin_with_keys():
            rest = (file for files in self._files_by_snapshot() for file in files if file.index_key not in read)
            found += self._read(rest, partial(_named, column, pa.array(list(left), pa.string())))
        return found

    def _files_by_snapshot(self) -> Iterator[list[IndexedFile]]:
        """`files`, then of each older snapshot those that no newer one has."""
        snapshots, known = Snapshots(self._store), {file.index_key for file in self.files()}
        yield self.files()
        for number in snapshots.numbers()[-2::-1]:
            try:
                found = list(self._of_snapshot(snapshots, number, known))
            except (InputError, OutputError):  # no reader shows its rows either
                if number in snapshots.numbers():  # else gc let it go since they were listed
                    self.unread.append(snapshot_key(number))
                continue
            known.update(file.index_key for file in found)
            yield found

    def _of_snapshot(self, snapshots: Snapshots, number: int, without: Collection[str] = ()) -> Iterator[IndexedFile]:
        columns, known = ["index_key", "shard_id", "ranges"], pa.array(list(without), pa.string())
        for batch in snapshots.batches(snapshots.read(number), "files", columns):
            new = batch.filter(pc.invert(pc.is_in(batch["index_key"], known)))
            for index_key, shard, ranges in zip(*(new[name].to_pylist() for name in columns), strict=True):
                low, high = json.loads(ranges).get("id", ("", ""))
                yield IndexedFile(index_key, shard, low, high)

    def _read(self, files: Iterable[IndexedFile], mask: Callable[[pa.Table], pa.Array]) -> Iterator[FoundRow]:
        def read(file: IndexedFile) -> list[FoundRow]:
            try:
                table = pq.ParquetFile(pa.BufferReader(self._store.read(file.index_key))).read(COLUMNS)
            except (NotFound, OutputError, pa.ArrowException, OSError):
                self.unread.append(file.index_key)
                return []
            kept = table.filter(mask(table))
            return [FoundRow(*row) for row in zip(*(kept[name].to_pylist() for name in COLUMNS), strict=True)]

        for rows in mapped_ahead(read, files, self._workers, "search"):
            yield from rows

"""Rows that `lathe compact` copied: for each data file of a receipt, where its rows are now. Table `copies` of a snapshot.

A receipt says that a shard is done and names the files that its attempt wrote; it never changes. After a compaction these files may be
deleted. Readers of the rows of a receipt look here first, by the key of its data file, its *origin*. Each snapshot takes the table over
from its parent.

A row of an origin that has copies is in exactly one of them, or among the dropped rows of exactly one. An origin has several copies if rows
that one compaction dropped counted again, from the origin, and a later compaction copied them. A copy without rows only says what was
dropped; the file that it names may be deleted.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.format.index import UNPLACED, IndexRow
from pipeline.ledger.manifest import FILES, written_file
from pipeline.ledger.receipts import stored_index

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from pipeline.records import WrittenFile
    from pipeline.storage import Store

DROPPED = pa.schema({"id": pa.string(), "source_uri": pa.string(), "source_key": pa.string(), "num_frames": pa.int64()})
COPIES = pa.schema(
    [
        pa.field("shard_id", pa.string(), nullable=False),  # of the receipt
        pa.field("origin", pa.string(), nullable=False),  # data file that the receipt names
        # JSON: row of `manifest.FILES` of the file that has the rows
        pa.field("file", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("first", pa.int64(), nullable=False),  # position of the first row in that file; the others follow it
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),  # of the tensors
        pa.field("dropped", pa.list_(pa.struct(DROPPED)), nullable=False),  # rows of the origin that were not copied
    ]
)
VARYING = ("rows", "frames", "hidden")  # columns of `manifest.FILES` that differ from snapshot to snapshot
INDEXES_KEPT = 8


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows of one origin in a compacted file, in the order of the origin. `dropped`: rows without offsets, see `IndexRow`."""

    origin: str
    file: WrittenFile
    first: int
    rows: int
    frames: int
    num_bytes: int  # of the tensors
    dropped: tuple[IndexRow, ...]

    def of(self, rows: list[IndexRow]) -> list[IndexRow]:
        """Those of this origin, of all rows of the compacted file."""
        return rows[self.first : self.first + self.rows]


class Copies:
    """All copies that a snapshot knows, from a table of `COPIES`. About 300 bytes a copy."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._given = None if table is None or not table.num_rows else table
        self._indexes: OrderedDict[str, list[IndexRow]] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self._given is not None

    @cached_property
    def table(self) -> pa.Table:
        """The copies, sorted by receipt and origin."""
        if (
            self._given is None
        ):  # not before it is needed: the first array of pyarrow imports pandas, if there is one (50 MB, a second)
            return COPIES.empty_table()
        return self._given.unify_dictionaries().sort_by([("shard_id", "ascending"), ("origin", "ascending")])

    @cached_property
    def shards(self) -> pa.Array:
        """Receipts that have copies, sorted."""
        return pa.array(sorted(self.table["shard_id"].unique().to_pylist()), pa.string())

    @cached_property
    def _places(self) -> np.ndarray:
        return np.array(self.table["shard_id"].to_pylist(), "S32")

    def of(self, shard_id: str) -> dict[str, tuple[Copy, ...]]:
        """Copies of the rows of one receipt, by origin: usually one, see the module."""
        found: dict[str, tuple[Copy, ...]] = {}
        if not self:
            return found
        low, high = (int(np.searchsorted(self._places, shard_id.encode(), side)) for side in ("left", "right"))
        for row in self.table.slice(low, high - low).to_pylist():
            found[row["origin"]] = (*found.get(row["origin"], ()), copy_of(row))
        return found

    def rows(self, store: Store, copy: Copy) -> list[IndexRow]:
        """Index rows of a copy; of one without rows nothing is read. The index of a compacted file is kept: many receipts have rows in it.

        Raises:
            NotFound: it is missing.
            OutputError: it cannot be read.
        """
        return copy.of(self.index(store, copy.file.index_key)) if copy.rows else []

    def index(self, store: Store, index_key: str) -> list[IndexRow]:
        """The whole index of a compacted file. Raises as `rows`."""
        with self._lock:
            if index_key in self._indexes:
                self._indexes.move_to_end(index_key)
                return self._indexes[index_key]
        rows = stored_index(store, index_key)
        with self._lock:
            self._indexes[index_key] = rows
            while len(self._indexes) > INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return rows

    def places(self, shards: pa.Array) -> dict[str, list[tuple[int, int]]]:
        """By compacted file: (first, rows) of every copy of these receipts that has rows."""
        found: dict[str, list[tuple[int, int]]] = {}
        if not self or not len(shards):
            return found
        columns = ["file", "first", "rows"]
        mine = self._with_rows.filter(pc.is_in(self._with_rows["shard_id"], shards)).select(columns)
        for row in mine.to_pylist():
            found.setdefault(self._key(row["file"]), []).append((row["first"], row["rows"]))
        return found

    def by_file(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of `COPIES` that have rows, by the key of the compacted file, in the order of `first`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._with_rows.to_pylist():
            found.setdefault(self._key(row["file"]), []).append(row)
        return {key: sorted(rows, key=lambda row: int(row["first"])) for key, rows in found.items()}

    def without(self, files: Collection[str]) -> pa.Table:
        """Rows of `COPIES` without those that have rows in one of these compacted files."""
        texts = pa.array([text for text, key in self._keys.items() if key in files], pa.string())
        mine = pc.and_(pc.is_in(self.table["file"], texts), pc.greater(self.table["rows"], 0))
        return self.table.filter(pc.invert(mine))

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Compacted files with rows, by key, as rows of `manifest.FILES` without `VARYING`."""
        parsed = map(json.loads, self._with_rows["file"].unique().to_pylist())
        return {row["key"]: row for row in parsed}

    @cached_property
    def _with_rows(self) -> pa.Table:
        return self.table.filter(pc.greater(self.table["rows"], 0))

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {text: json.loads(text)["key"] for text in self.table["file"].unique().to_pylist()}

    def _key(self, file: str) -> str:
        return self._keys[file]


NO_COPIES = Copies()


def copy_of(row: dict[str, Any]) -> Copy:
    """The copy that a row of `COPIES` describes."""
    file = written_file(json.loads(row["file"]))
    dropped = tuple(map(_dropped, row["dropped"]))
    return Copy(row["origin"], file, row["first"], row["rows"], row["frames"], row["bytes"], dropped)


def file_text(row: dict[str, Any]) -> str:
    """Column `file` of `COPIES` from a row of `manifest.FILES`."""
    return json.dumps({name: row[name] for name in FILES.names if name not in VARYING}, sort_keys=True)


def dropped_row(row: IndexRow) -> dict[str, Any]:
    """One item of the column `dropped`."""
    return {name: getattr(row, name) for name in DROPPED.names}


def _dropped(item: dict[str, Any]) -> IndexRow:
    return IndexRow(
        **item,
        row=UNPLACED,
        latent_offset=UNPLACED,
        latent_length=0,
        latent_hash="",
        logvar_offset=None,
        logvar_length=None,
        logvar_hash=None,
        shape=(),
        dtype="",
        bucket="",
        source_hash="",
        caption=None,
    )


class CompactedFiles:
    """Rows of `manifest.FILES` of compacted files of which other rows count than in the parent snapshot."""

    def __init__(self, store: Store, copies: Copies) -> None:
        self._store, self._copies = store, copies
        self._counting: dict[str, np.ndarray] = {}  # by key: mask of rows that count

    def take_out(self, files: Iterable[pa.RecordBatch], outdated: pa.Array) -> Iterator[pa.RecordBatch]:
        """Rows of the parent's files, without compacted files that hold rows of outdated receipts. These keep the rows of the others."""
        gone = self._copies.places(outdated)
        if not gone:
            yield from files
            return
        keys = pa.array(gone, pa.string())
        for batch in files:
            touched = pc.is_in(batch["key"], keys)
            for row in batch.filter(touched).to_pylist():
                counting = np.ones(row["file_rows"], bool)
                counting[row["hidden"]] = False
                for first, rows in gone[row["key"]]:
                    counting[first : first + rows] = False
                self._counting[row["key"]] = counting
            yield batch.filter(pc.invert(touched))

    def show(self, copy: Copy, hidden: Iterable[int]) -> None:
        """Counts the rows of a copy, without those at these positions of the compacted file."""
        if not copy.rows:
            return
        counting = self._counting.setdefault(copy.file.key, np.zeros(copy.file.rows, bool))
        counting[copy.first : copy.first + copy.rows] = True
        counting[list(hidden)] = False

    def ids(self) -> list[str]:
        """`shard_id` of the rows that `table` may have."""
        return sorted({self._copies.files[key]["shard_id"] for key in self._counting})

    def table(self) -> pa.Table:
        """Rows of `manifest.FILES`. Reads indexes of files of which only a part counts.

        Raises:
            NotFound: an index is missing.
            OutputError: it cannot be read.
        """
        found = []
        for key, counting in sorted(self._counting.items()):
            if not counting.any():
                continue
            row, frames = self._copies.files[key], self._copies.files[key]["file_frames"]
            if not counting.all():
                rows = self._copies.index(self._store, row["index_key"])
                frames = sum(item.num_frames for item in rows if counting[item.row])
            hidden = np.flatnonzero(~counting).tolist()
            found.append({**row, "rows": int(counting.sum()), "frames": frames, "hidden": hidden})
        return pa.Table.from_pylist(found, FILES)

"""Search for names in an output: which receipts name a URI, which rows and rejects have a key or an id.

URIs are found by their hashes in the summaries of receipts. Ids of rows begin with the sample's key, so the ranges of ids that snapshots
and receipts keep for each file exclude most files; only side indexes of the others are read.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import NotFound, OutputError
from pipeline.format.columns import readable_key, storable
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import URI_BYTES, uri_id
from pipeline.ledger.summary_tables import read_summaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import Receipt, Reject
    from pipeline.storage import Store

COLUMNS = ["key", "shard_id", "uris", "reasons"]
ROW_COLUMNS = [
    "id",
    "row",
    "latent_length",
    "bucket",
    "num_frames",
    "shape",
    "dtype",
    "source_uri",
    "source_key",
    "source_hash",
]
ROW_ID = re.compile(r".+-\d{4}-[0-9a-f]{16}")
NEAR = 5
NEAR_FILES, NEAR_RECEIPTS = 4, 256  # read for names that are near an unknown one


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A data file whose index may be searched. `ranges`: see `WrittenFile.ranges`."""

    key: str
    index_key: str
    ranges: dict[str, list[Any]]

    def may_hold(self, name: str, *, is_id: bool) -> bool:
        """Whether the file may have the row `name`, or, unless `is_id`, rows of a sample with the key `name`."""
        if "id" not in self.ranges:
            return True
        low, high = map(str, self.ranges["id"])
        prefix = f"{readable_key(name)}-"
        return low <= name <= high or (not is_id and low[: len(prefix)] <= prefix <= high)


@dataclass(slots=True)
class Found:
    """Where a key or id occurs: rows as dictionaries of `ROW_COLUMNS` with `file`, and rejects."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def uris(self) -> list[str]:
        """URIs of the inputs that have it, sorted."""
        return sorted({row["source_uri"] for row in self.rows} | {storable(str(item.uri)) for item in self.rejects})


class NameSearch:
    """Searches one output. Receipts are summarised once, in the constructor; a context manager, because they lie in a temporary file.

    Raises:
        OutputError: a receipt or a table that cannot be read.
    """

    def __init__(self, store: Store, name: str, uris: Iterable[str], workers: int = 16) -> None:
        """`name`: the key or id, `uris`: spellings of the name as a URI. Receipts that are not cached are looked at while they are read."""
        self._store, self._workers = store, workers
        self._ledger = Ledger(store)
        self._name, self._is_id = name, ROW_ID.fullmatch(name) is not None
        self._folder = tempfile.TemporaryDirectory(prefix="lathe-why-")
        self._read: dict[str, list[IndexedFile]] = {}  # of receipts that were read now, by shard: their files
        self._rejects: list[Reject] = []  # of receipts that were read now
        self._path = Summaries(store, workers).spool(Path(self._folder.name) / "receipts.parquet", self._look_at)
        self._table = read_table(self._path, COLUMNS)
        self.uris = list(dict.fromkeys(uris))
        self.snapshot: Snapshot | None = Snapshots(store).latest()
        self._indexes: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> NameSearch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def naming(self, uris: Iterable[str]) -> list[ReceiptSummary]:
        """Summaries of all receipts that name one of these URIs."""
        wanted = np.frombuffer(b"".join(map(uri_id, uris)), "<u8")
        column = self._table["uris"]
        named = np.frombuffer(b"".join(column.to_pylist()), "<u8")
        rows = np.repeat(np.arange(self._table.num_rows), pc.binary_length(column).to_numpy() // URI_BYTES)
        return read_summaries(self._path, np.unique(rows[np.isin(named, wanted)]))

    def find(self) -> Found:
        """Rows with this id or key. Without any, rejects of a sample with this key, for which all receipts with rejects are read."""
        files = [item for item in self._files() if item.may_hold(self._name, is_id=self._is_id)]
        found = Found([row for row in self._rows(files) if self._is_named(row)])
        if not found.rows and not self._is_id:
            found.rejects = [*self._rejects, *self._cached_rejects()]
        return found

    def _is_named(self, row: dict[str, Any]) -> bool:
        return row["id"] == self._name or (not self._is_id and row["source_key"] == storable(self._name))

    def rows_of(self, files: Iterable[IndexedFile], uri: str) -> list[dict[str, Any]]:
        """Rows of one input in these files. Files whose index is gone are passed over: their rows were taken down or rewritten."""
        return [row for row in self._rows(files) if row["source_uri"] == storable(uri)]

    def near(self) -> list[str]:
        """Names like the one that was not found: keys of rows, else URIs of inputs."""
        files = sorted(self._files(), key=lambda item: _distance(item, readable_key(self._name)))[:NEAR_FILES]
        names = {row["id" if self._is_id else "source_key"] for row in self._rows(files)}
        cutoff = 0.4 if self._is_id else 0.6  # the digest of an id is like no other
        by_key = difflib.get_close_matches(self._name, names, NEAR, cutoff)
        return by_key or difflib.get_close_matches(self._name, self._some_uris(), NEAR, cutoff=0.4)

    # --- files and rows -----------------------------------------------------------------------------------------------

    def _look_at(self, receipt: Receipt) -> None:
        """A receipt that is not cached: its files, and rejects of this name."""
        self._read[receipt.shard_id] = [IndexedFile(item.key, item.index_key, item.ranges) for item in receipt.files]
        self._rejects += [item for item in receipt.rejects if item.key == self._name]

    def _files(self) -> list[IndexedFile]:
        """Files of the newest snapshot, and of receipts that it does not cover."""
        found: dict[str, IndexedFile] = {}
        covered: set[str] = set()
        if self.snapshot is not None:
            found = {item.key: item for item in snapshot_files(self._store, self.snapshot)}
            table = Snapshots(self._store).table(self.snapshot, "receipts", ["shard_id"])
            covered = set(table["shard_id"].to_pylist())
        others = self._table.filter(
            pc.invert(pc.is_in(self._table["shard_id"], pa.array(sorted(covered), pa.string())))
        )
        unread = [key for key, shard in self._pairs(others) if shard not in self._read]
        for receipt in self._receipts(unread):
            self._look_at(receipt)
        for shard in others["shard_id"].to_pylist():
            found.update({item.key: item for item in self._read.get(shard, ())})
        return list(found.values())

    def _pairs(self, table: pa.Table) -> Iterator[tuple[str, str]]:
        yield from zip(table["key"].to_pylist(), table["shard_id"].to_pylist(), strict=True)

    def _cached_rejects(self) -> list[Reject]:
        """Rejects of this key in receipts that have not been read yet and that have rejects."""
        some = self._table.filter(pc.not_equal(self._table["reasons"], "{}"))
        keys = [key for key, shard in self._pairs(some) if shard not in self._read]
        return [item for receipt in self._receipts(keys) for item in receipt.rejects if item.key == self._name]

    def _receipts(self, keys: list[str]) -> Iterator[Receipt]:
        found = self._ledger.read_all(([key] for key in keys), self._workers)
        return (receipt for receipt in found if receipt is not None)

    def _rows(self, files: Iterable[IndexedFile]) -> Iterator[dict[str, Any]]:
        """Rows of these files; indexes are read once."""
        files = list(files)
        unread = [item for item in files if item.key not in self._indexes]
        read: Callable[[IndexedFile], list[dict[str, Any]]] = lambda item: index_rows(self._store, item)  # noqa: E731
        for item, rows in zip(unread, mapped_ahead(read, unread, self._workers, "indexes"), strict=True):
            self._indexes[item.key] = rows
        for item in files:
            yield from self._indexes[item.key]

    def _some_uris(self) -> list[str]:
        keys = self._table["key"].to_pylist()
        step = max(1, len(keys) // NEAR_RECEIPTS)
        found = self._receipts(keys[::step])
        return sorted({source.uri for receipt in found for source in receipt.shard.objects})


def index_rows(store: Store, file: IndexedFile) -> list[dict[str, Any]]:
    """Rows of a file as dictionaries of `ROW_COLUMNS`, with `file`; none if its index is gone.

    Raises:
        OutputError: the index cannot be read.
    """
    try:
        data = store.read(file.index_key)
    except NotFound:
        return []
    try:
        table = pq.read_table(pa.BufferReader(data), columns=ROW_COLUMNS, page_checksum_verification=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        message = f"{file.index_key} cannot be read as a side index: {error}"
        raise OutputError(message, uri=store.uri(file.index_key)) from None
    return [{**row, "file": file.key} for row in table.to_pylist()]


def snapshot_files(store: Store, snapshot: Snapshot) -> list[IndexedFile]:
    """Files of a snapshot."""
    table = Snapshots(store).table(snapshot, "files", ["key", "index_key", "ranges"])
    columns = (table[name].to_pylist() for name in ("key", "index_key", "ranges"))
    return [IndexedFile(key, index, json.loads(ranges)) for key, index, ranges in zip(*columns, strict=True)]


def _distance(file: IndexedFile, name: str) -> tuple[int, int]:
    """How far the ids of a file are from a name: by the length of the common beginning, longest first."""
    low, high = map(str, file.ranges.get("id", ("", "")))
    common = max(sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, name, end))) for end in (low, high))
    return (0 if low <= name <= high else 1, -common)

"""Byte indexes of data files, compact, with a cache bounded by bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.stored import tensor_shape
from pipeline.loader.open_files import with_files_closed
from pipeline.process.fork_locks import fork_lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.ledger.takedowns import Takedowns
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store

CACHE_BYTES = 512 * 1024 * 1024
TEXTS = ("id", "caption", "source_uri", "source_key", "source_hash")


class _Named(NamedTuple):
    """The fields of a row that takedowns name."""

    id: str
    source_uri: str
    source_key: str


class _Texts:
    """A column of texts, one of which costs 0.4 microseconds; Arrow's own scalars cost three."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column
        _, offsets, data = column.buffers()
        self._ends = np.frombuffer(offsets, np.int32)[column.offset :].data
        self._data = memoryview(data) if data is not None else memoryview(b"")
        self._null = memoryview(column.is_null().to_numpy(zero_copy_only=False)) if column.null_count else None

    def __getitem__(self, row: int) -> str | None:
        if self._null is not None and self._null[row]:
            return None
        return str(self._data[self._ends[row] : self._ends[row + 1]], "utf-8")


class FileIndex:
    """Index of one data file. Rows are positions in the file. `stored`: names of what a row stores; tensors are numbers in this list. A
    file may be without some of them, paired videos.
    """

    def __init__(self, table: pa.Table, stored: Sequence[str]) -> None:
        self._stored = stored
        self._texts = {name: _Texts(table[name].combine_chunks()) for name in TEXTS}
        self._frames = table["num_frames"].to_numpy()
        shapes = table["shape"].combine_chunks()
        self._shapes = shapes.flatten().to_numpy().reshape(len(shapes), -1)
        there = {n: name for n, name in enumerate(stored) if f"{name}_offset" in table.column_names}
        # Memoryviews give a number of Python three times as fast as arrays.
        self._offsets = {n: memoryview(table[f"{name}_offset"].to_numpy()) for n, name in there.items()}
        self._lengths = {n: memoryview(table[f"{name}_length"].to_numpy()) for n, name in there.items()}
        self._hashes = {n: table[f"{name}_hash"].combine_chunks() for n, name in there.items()}
        self.num_bytes = int(table.nbytes)
        self._hidden: tuple[Takedowns, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def num_frames(self) -> np.ndarray:
        """Frames of each clip, int64."""
        return self._frames

    def text(self, column: str, row: int) -> str | None:
        """Id, caption or source of a row."""
        return self._texts[column][row]

    def shape(self, row: int, tensor: int = 0) -> tuple[int, ...]:
        """C, t, h, w of a tensor."""
        return tensor_shape(self._stored[tensor], tuple(self._shapes[row].tolist()))

    def offset(self, row: int, tensor: int = 0) -> int:
        """First byte of a tensor in the file."""
        found: int = self._offsets[tensor][row]
        return found

    def length(self, row: int, tensor: int = 0) -> int:
        """Bytes of a tensor."""
        found: int = self._lengths[tensor][row]
        return found

    @property
    def last(self) -> int:
        """Number of a row's last tensor or image in the file."""
        return max(self._offsets)

    def hash(self, row: int, tensor: int) -> str:
        """BLAKE2b-128 in hex of the bytes of a tensor."""
        value: str = self._hashes[tensor][row].as_py()
        return value

    def column(self, name: str) -> pa.Array | None:
        """All values of a text column or of `num_frames`; None if the index does not have it."""
        if name == "num_frames":
            return pa.array(self.num_frames)
        return self._texts[name].column if name in self._texts else None

    def find(self, name: str) -> int | None:
        """Position of the row with this id."""
        found = self._texts["id"].column.index(name).as_py()
        return None if found < 0 else int(found)

    def hidden(self, takedowns: Takedowns) -> np.ndarray | None:
        """Which rows these takedowns hide, bool; None if none is. Remembered for the takedowns asked for last."""
        if not takedowns:
            return None
        if self._hidden is None or self._hidden[0] is not takedowns:
            named = zip(*(self._texts[name].column.to_pylist() for name in _Named._fields), strict=True)
            mask = [takedowns.hides(_Named(*values)) for values in named]
            self._hidden = takedowns, np.array(mask, bool)
        return self._hidden[1] if self._hidden[1].any() else None


class IndexCache:
    """Indexes of the files of a dataset, read when first asked for. Safe for several threads."""

    def __init__(
        self, store: Store, files: DataFiles, stored: Sequence[str], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """`stored`: as for `FileIndex`."""
        self._store, self._files, self._stored = store, files, stored
        self._most = cache_bytes
        self._held: OrderedDict[int, FileIndex] = OrderedDict()
        self._bytes = 0
        self._lock = fork_lock()

    def held(self, number: int) -> FileIndex | None:
        """The index if it is in memory."""
        with self._lock:
            if (found := self._held.get(number)) is not None:
                self._held.move_to_end(number)
            return found

    def held_of(self, numbers: Iterable[int]) -> dict[int, FileIndex]:
        """Those of the indexes that are in memory."""
        held = self._held
        with self._lock:
            found = {number: held[number] for number in numbers if number in held}
            for number in found:
                held.move_to_end(number)
        return found

    def get(self, number: int) -> FileIndex:
        """Index of one file.

        Raises:
            InputError: missing, or not the index that was published.
            StorageUnavailable, AccessError: the store does not give it.
        """
        if (found := self.held(number)) is not None:
            return found
        made = self.read(number)
        with self._lock:
            if number not in self._held:
                self._held[number] = made
                self._bytes += made.num_bytes
                while self._bytes > self._most and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1].num_bytes
            return self._held.get(number, made)

    def read(self, number: int) -> FileIndex:
        """As `get`, without the cache."""
        places = [f"{name}_{part}" for name in self._stored for part in ("offset", "length", "hash")]
        return FileIndex(self.columns(number, [*places, *TEXTS, "num_frames", "shape"]), self._stored)

    def columns(self, number: int, names: Sequence[str]) -> pa.Table:
        """Columns of an index, without the cache. Raises as `get`."""
        key = self._files.value("index_key", number)
        data = self._store.patiently(lambda: with_files_closed(lambda: self._store.read(key)))
        if (found := hashlib.sha256(data).hexdigest()) != (wanted := self._files.value("index_sha256", number)):
            raise InputError(
                f"{self._store.uri(key)} is not the index that was recorded: sha256 {found}, expected {wanted}; see `lathe verify`"
            )
        return pq.ParquetFile(pa.BufferReader(data)).read(list(names), use_threads=False)

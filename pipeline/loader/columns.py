"""Scalar columns of data files, read without the tensors between them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.columns import SCALARS
from pipeline.loader.open_files import with_files_closed
from pipeline.process.fork_locks import fork_lock
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store

CACHE_BYTES = 128 * 1024 * 1024
COLUMN_BYTES = 1024
Held = tuple[tuple[int, int | None], tuple[str, ...]]


def read_columns(
    store: Store,
    files: DataFiles,
    number: int,
    index: FileIndex | None,
    names: Sequence[str],
    positions: np.ndarray | None = None,
) -> pa.Table:
    """Columns `names`, of `SCALARS` or `id`, of the rows at `positions` of a file, in this order; of all in file order without.

    `index`: of this file; needed for tars, of which only the members of these rows are read, one request each.

    Raises:
        InputError: not the file that its index and the manifest describe.
        StorageUnavailable: the store failed for too long.
    """
    return store.patiently(lambda: _read_columns(store, files, number, index, names, positions))


def _read_columns(
    store: Store,
    files: DataFiles,
    number: int,
    index: FileIndex | None,
    names: Sequence[str],
    positions: np.ndarray | None,
) -> pa.Table:
    key, size, rows = (files.value(name, number) for name in ("key", "bytes", "file_rows"))
    try:
        if key.endswith(".tar"):
            if index is None:
                raise ValueError("columns of a tar are found by its index")
            return _of_tar(store, key, size, index, names, range(rows) if positions is None else positions.tolist())
        file = pa.PythonFile(RangedFile(store, key, size), mode="r")
        # Reading neighbours together costs 0.14 ms a file, which one column has no use for.
        table = pq.ParquetFile(file, pre_buffer=len(names) > 1).read(list(names), use_threads=False)
    except (pa.ArrowException, tarfile.ReadError, ValueError, KeyError) as error:
        raise InputError(f"{store.uri(key)} cannot be read: {error}; see `lathe verify`") from None
    if table.num_rows != rows:
        raise InputError(f"{store.uri(key)} has {table.num_rows} rows, its index {rows}; see `lathe verify`")
    return table if positions is None or len(positions) == rows else table.take(pa.array(positions))


class ColumnCache:
    """Columns of the files of a dataset, read when first asked for: those of a whole Parquet file, those of one row of a tar.

    Safe for several threads.
    """

    def __init__(self, store: Store, files: DataFiles, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._store, self._files, self._most = store, files, cache_bytes
        self._held: OrderedDict[Held, pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = fork_lock()

    def row(self, number: int, index: FileIndex, names: tuple[str, ...], position: int) -> dict[str, Any]:
        """Values of one row of a file by column; metadata as an object. Raises as `read_columns`."""
        if not names:
            return {}
        unit = self.unit(number, position)
        table = self._table(index, names, unit)
        found = {name: table[name][position if unit[1] is None else 0].as_py() for name in names}
        if "metadata" in found:
            found["metadata"] = json.loads(found["metadata"])
        return found

    def unit(self, number: int, position: int) -> tuple[int, int | None]:
        """What is read for a row: a file, or one row of it."""
        return number, position if self._files.value("key", number).endswith(".tar") else None

    def holds(self, number: int, names: tuple[str, ...], position: int) -> bool:
        """Whether `row` of these columns reads nothing."""
        return not names or (self.unit(number, position), names) in self._held

    def _table(self, index: FileIndex, names: tuple[str, ...], unit: tuple[int, int | None]) -> pa.Table:
        with self._lock:
            if (found := self._held.get((unit, names))) is not None:
                self._held.move_to_end((unit, names))
                return found
        number, row = unit
        positions = None if row is None else np.array([row])
        table = with_files_closed(lambda: read_columns(self._store, self._files, number, index, names, positions))
        with self._lock:
            if (unit, names) not in self._held:
                self._held[unit, names] = table
                self._bytes += _bytes_held(table)
                while self._bytes > self._most and len(self._held) > 1:
                    self._bytes -= _bytes_held(self._held.popitem(last=False)[1])
        return table


def _bytes_held(table: pa.Table) -> int:
    """With what Arrow and Python need for each column, which is more than the values of one row."""
    return int(table.nbytes) + COLUMN_BYTES * int(table.num_columns)


def _of_tar(
    store: Store, key: str, size: int, index: FileIndex, names: Sequence[str], positions: Iterable[int]
) -> pa.Table:
    """The JSON member of each row lies between its last tensor and the first tensor of the next row."""
    rows = []
    for row in positions:
        last = index.last
        begin = -(-(index.offset(row, last) + index.length(row, last)) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        end = index.offset(row + 1) if row + 1 < len(index) else size
        name = str(index.text("id", row))
        rows.append({"id": name, **_described(store.read_range(key, begin, end - begin), name)})
    kinds = {"id": pa.string(), **SCALARS}
    return pa.table({name: pa.array([row[name] for row in rows], kinds[name]) for name in names})


def _described(data: bytes, name: str) -> dict[str, Any]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        while (member := archive.next()) is not None:
            content = archive.extractfile(member) if member.name == f"{name}.json" else None
            if content is not None:
                found: dict[str, Any] = json.load(content)
                return found
    raise ValueError(f"no member {name}.json after its tensor")

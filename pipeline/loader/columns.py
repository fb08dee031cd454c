"""Scalar columns of data files, read without the tensors between them."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.columns import SCALARS
from pipeline.loader.open_files import with_files_closed
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store

CACHE_BYTES = 128 * 1024 * 1024


def read_columns(store: Store, files: DataFiles, number: int, index: FileIndex, names: Sequence[str]) -> pa.Table:
    """Columns `names` of `SCALARS` for all rows of a file, in file order.

    Raises:
        InputError: not the file that its index describes.
    """
    key, size = files.value("key", number), files.value("bytes", number)
    try:
        if key.endswith(".tar"):
            return _of_tar(store, key, size, index, names)
        file = pa.PythonFile(RangedFile(store, key, size), mode="r")
        table = pq.ParquetFile(file, pre_buffer=True).read(list(names), use_threads=False)
    except (pa.ArrowException, tarfile.ReadError, ValueError, KeyError) as error:
        raise InputError(f"{store.uri(key)} cannot be read: {error}; see `lathe verify`") from None
    if table.num_rows != len(index):
        raise InputError(f"{store.uri(key)} has {table.num_rows} rows, its index {len(index)}; see `lathe verify`")
    return table


class ColumnCache:
    """Columns of the files of a dataset, read when first asked for. Safe for several threads."""

    def __init__(self, store: Store, files: DataFiles, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._store, self._files, self._most = store, files, cache_bytes
        self._held: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def row(self, number: int, index: FileIndex, names: tuple[str, ...], position: int) -> dict[str, Any]:
        """Values of one row of a file by column; metadata as an object. Raises as `read_columns`."""
        if not names:
            return {}
        table = self._table(number, index, names)
        found = {name: table[name][position].as_py() for name in names}
        if "metadata" in found:
            found["metadata"] = json.loads(found["metadata"])
        return found

    def _table(self, number: int, index: FileIndex, names: tuple[str, ...]) -> pa.Table:
        with self._lock:
            if (found := self._held.get((number, names))) is not None:
                self._held.move_to_end((number, names))
                return found
        table = with_files_closed(lambda: read_columns(self._store, self._files, number, index, names))
        with self._lock:
            if (number, names) not in self._held:
                self._held[number, names] = table
                self._bytes += table.nbytes
                while self._bytes > self._most and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
        return table


def _of_tar(store: Store, key: str, size: int, index: FileIndex, names: Sequence[str]) -> pa.Table:
    """The JSON member of each row lies between its last tensor and the first tensor of the next row."""
    rows = []
    for row in range(len(index)):
        last = index.tensors - 1
        begin = -(-(index.offset(row, last) + index.length(row, last)) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        end = index.offset(row + 1) if row + 1 < len(index) else size
        rows.append(_described(store.read_range(key, begin, end - begin), str(index.text("id", row))))
    return pa.table({name: pa.array([row[name] for row in rows], SCALARS[name]) for name in names})


def _described(data: bytes, name: str) -> dict[str, Any]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        while (member := archive.next()) is not None:
            content = archive.extractfile(member) if member.name == f"{name}.json" else None
            if content is not None:
                found: dict[str, Any] = json.load(content)
                return found
    raise ValueError(f"no member {name}.json after its tensor")

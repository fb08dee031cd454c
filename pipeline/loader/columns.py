"""Scalar columns of data files, read without the tensors between them."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.columns import SCALARS
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store


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


def _of_tar(store: Store, key: str, size: int, index: FileIndex, names: Sequence[str]) -> pa.Table:
    """The JSON member of each row lies between its last tensor and the first tensor of the next row."""
    rows = []
    for row in range(len(index)):
        last = index.places(row)[-1]
        begin = -(-(last.offset + last.length) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        end = index.places(row + 1)[0].offset if row + 1 < len(index) else size
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

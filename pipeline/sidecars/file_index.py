"""Index of a file of sidecars: key, place, hash and shape of every tensor. Parquet, one row per row of the data file, in its order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.sidecars.names import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.storage import Store

KEYS = f"S{KEY_BYTES}"  # numpy's type of keys; compares all 16 bytes, zeros at the end included


class Place(NamedTuple):
    """A tensor in its data file: bytes `[offset, offset + length)`, their BLAKE2b-128, the tensor's shape."""

    offset: int
    length: int
    hash: bytes
    shape: tuple[int, ...]


def index_schema(names: Iterable[str]) -> pa.Schema:
    """Columns of an index of tensors `names`."""
    fields = [pa.field("key", pa.binary(KEY_BYTES), nullable=False)]
    for name in names:
        fields += [
            pa.field(f"{name}_offset", pa.int64(), nullable=False),
            pa.field(f"{name}_length", pa.int64(), nullable=False),
            pa.field(f"{name}_hash", pa.binary(KEY_BYTES), nullable=False),
            pa.field(f"{name}_shape", pa.list_(pa.int64()), nullable=False),
        ]
    return pa.schema(fields)


class FileIndex:
    """Places of the tensors of one file by row."""

    def __init__(self, table: pa.Table, names: Iterable[str]) -> None:
        self.num_bytes = int(table.nbytes)
        self._columns = {
            name: (
                table[f"{name}_offset"].to_numpy(),
                table[f"{name}_length"].to_numpy(),
                table[f"{name}_hash"].combine_chunks(),
                table[f"{name}_shape"].combine_chunks(),
            )
            for name in names
        }

    def place(self, name: str, row: int) -> Place:
        """Where tensor `name` of a row lies."""
        offsets, lengths, hashes, shapes = self._columns[name]
        return Place(int(offsets[row]), int(lengths[row]), hashes[row].as_py(), tuple(shapes[row].as_py()))


def read_index_table(store: Store, key: str, sha256: str) -> pa.Table:
    """The index at `key`.

    Raises:
        OutputError: it is not the index that was recorded.
        NotFound, StorageUnavailable: the store does not give it.
    """
    data = store.read(key)
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise OutputError(
            f"{key} is not the index that was recorded: sha256 {found}, expected {sha256}", uri=store.uri(key)
        )
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def packed_keys(table: pa.Table) -> bytes:
    """Keys of an index one after another, 16 bytes each."""
    return b"".join(table["key"].to_pylist())


def unpacked_keys(data: bytes) -> np.ndarray:
    """Inverse of `packed_keys`, as numpy's `S16`."""
    return np.frombuffer(data, KEYS)


def packed_array(keys: np.ndarray) -> list[bytes]:
    """Keys of an array `S16` as 16 bytes each: numpy's own conversion cuts zeros off the end."""
    data = keys.tobytes()
    return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]

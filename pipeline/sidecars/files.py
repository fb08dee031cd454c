"""Writer of a file of sidecars: Parquet, each tensor one contiguous byte range, with its index.

Takes rows one by one, holds one row group of 2 MiB. `close` reads the finished file back and compares every range with its hash.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import BuildError
from pipeline.format.tensors import Payload, payload_hash, stored_values
from pipeline.records import ChannelStats
from pipeline.sidecars.description import DTYPES, FLOATS
from pipeline.sidecars.file_index import index_schema

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.sidecars.description import SidecarSet

ROW_GROUP_BYTES = 2 * 1024 * 1024
LARGEST_TENSOR = 1024**3
"""Bytes. A Parquet page, hence a value, must stay below 2 GiB."""
METADATA_KEY = b"latentset"
_NEEDLE = 32  # bytes of a value that are searched for with its length
_GAP = 4096  # largest gap searched between two values; page headers without statistics are under 100 bytes


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A finished local file and its index. `stats`: over all values of each tensor of floats, as one channel."""

    rows: int
    num_bytes: int
    sha256: str
    index: pa.Table
    stats: dict[str, ChannelStats]


def tensor_payload(array: np.ndarray, dtype: str) -> Payload:
    """The array's bytes, little-endian in C order.

    Raises:
        ValueError: the array's numpy type is not that of `dtype`, or it is too large for a Parquet value.
    """
    wanted = np.dtype(DTYPES[dtype])
    if array.dtype.itemsize != wanted.itemsize or array.nbytes > LARGEST_TENSOR:
        raise ValueError(
            f"a {dtype} tensor of up to 1 GiB is held as numpy {wanted}, got {array.nbytes} of {array.dtype}"
        )
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return Payload(data, tuple(array.shape), dtype, payload_hash(data))


def schema_of(described: SidecarSet) -> pa.Schema:
    """Columns of a data file: what rows are found by, then bytes, shape and type of each tensor."""
    fields = [pa.field(described.key, pa.string(), nullable=False)]
    for name in described.tensors:
        fields += [
            pa.field(f"{name}_bytes", pa.binary(), nullable=False),
            pa.field(f"{name}_shape", pa.list_(pa.int64()), nullable=False),
            pa.field(f"{name}_dtype", pa.string(), nullable=False),
        ]
    about = json.loads(described.to_json())
    del about["created"]  # of the set object, which is created with the first file
    return pa.schema(fields, {METADATA_KEY: json.dumps(about, sort_keys=True).encode()})


class SidecarFileWriter:
    """Writer of one file at `path`."""

    def __init__(self, path: Path, described: SidecarSet) -> None:
        self._path, self._set, self._schema = path, described, schema_of(described)
        names = [f"{name}.list.element" if name.endswith("_shape") else name for name in self._schema.names]
        self._writer = pq.ParquetWriter(
            str(path),
            self._schema,
            compression={name: "NONE" if name.endswith("_bytes") else "ZSTD" for name in names},
            use_dictionary=[f"{name}_dtype" for name in described.tensors],
            write_statistics=[described.key],
            write_page_index=True,
            write_page_checksum=True,
            data_page_version="1.0",
        )
        self._waiting: list[tuple[str, Mapping[str, Payload]]] = []
        self._waiting_bytes = 0
        self._rows: list[tuple[bytes, dict[str, tuple[bytes, int, str, tuple[int, ...]]]]] = []
        self._stats: dict[str, ChannelStats] = {}

    def append(self, key: bytes, name: str, tensors: Mapping[str, Payload]) -> None:
        """Adds a row. `name`: the id, or the hash of the caption.

        Raises:
            BuildError: other tensors than the set has, or a value that is not finite.
        """
        for tensor, kind in self._set.tensors.items():
            value = tensors[tensor]
            if value.dtype != kind.dtype or not kind.fits(value.shape):
                raise BuildError(
                    f"{tensor} of {name} is {value.dtype} {list(value.shape)}, the set has {kind}", stage="write"
                )
            if value.dtype in FLOATS:
                self._measure(tensor, value, name)
        found = {n: (bytes(t.data[:_NEEDLE]), t.num_bytes, t.hash, t.shape) for n, t in tensors.items()}
        self._rows.append((key, found))
        self._waiting.append((name, tensors))
        self._waiting_bytes += sum(tensor.num_bytes for tensor in tensors.values())
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> FinishedFile:
        """Finishes the file and reads it back.

        Raises:
            BuildError: bytes of the file are not those that were written (a bug, a disk that fails).
        """
        self._flush()
        self._writer.close()
        columns: dict[str, list[Any]] = {"key": [key for key, _ in self._rows]}
        schema = index_schema(self._set.tensors)
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for name in self._set.tensors:
                    columns |= self._found(content, name)
        index = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)
        return FinishedFile(len(self._rows), self._path.stat().st_size, digest, index, self._stats)

    def discard(self) -> None:
        """Stops writing and deletes the file; safe at any time."""
        with suppress(OSError):  # closing writes a footer; the file is discarded, so errors are ignored
            self._writer.close()
        self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._waiting:
            return
        columns: dict[str, Any] = {self._set.key: pa.array([name for name, _ in self._waiting], pa.string())}
        for name in self._set.tensors:
            values = [tensors[name] for _, tensors in self._waiting]
            columns |= {
                f"{name}_bytes": pa.array([bytes(value.data) for value in values], pa.binary()),
                f"{name}_shape": pa.array([value.shape for value in values], pa.list_(pa.int64())),
                f"{name}_dtype": pa.array([value.dtype for value in values], pa.string()),
            }
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _measure(self, tensor: str, value: Payload, name: str) -> None:
        values = stored_values(bytes(value.data), value.dtype, value.shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise BuildError(
                f"{tensor} of {name} has values that are not finite in {value.dtype}; encode in bfloat16 or float32",
                stage="encode",
            )
        if values.size:
            mean = float(values.mean())
            spread = float(np.square(values - mean).sum())
            one = ChannelStats(values.size, (mean,), (spread,), (float(values.min()),), (float(values.max()),))
            self._stats[tensor] = self._stats[tensor].merge(one) if tensor in self._stats else one

    def _found(self, content: mmap.mmap, name: str) -> dict[str, list[Any]]:
        """Index columns of a tensor: each value stands after its length, in the order of the rows."""
        column, at, group = self._schema.get_field_index(f"{name}_bytes"), 0, -1
        footer = pq.read_metadata(self._path)
        ends = np.cumsum([footer.row_group(n).num_rows for n in range(footer.num_row_groups)]).tolist()
        offsets: list[int] = []
        for row, (_, tensors) in enumerate(self._rows):
            needle, length, digest, _ = tensors[name]
            while group < 0 or row >= ends[group]:
                group += 1
                at = footer.row_group(group).column(column).data_page_offset
            needle = length.to_bytes(4, "little") + needle
            start = content.find(needle, at, at + _GAP + len(needle))
            offset = start + 4
            if start < 0 or payload_hash(memoryview(content[offset : offset + length])) != digest:
                raise BuildError(
                    f"{name} of row {row} of {self._path.name} is not the tensor that was written", stage="write"
                )
            offsets.append(offset)
            at = offset + length
        return {
            f"{name}_offset": offsets,
            f"{name}_length": [tensors[name][1] for _, tensors in self._rows],
            f"{name}_hash": [bytes.fromhex(tensors[name][2]) for _, tensors in self._rows],
            f"{name}_shape": [tensors[name][3] for _, tensors in self._rows],
        }

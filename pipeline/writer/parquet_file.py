"""Writer of Parquet latent files: each tensor is one contiguous byte range.

Takes sorted groups of `LatentRow`s of one bucket, returns a finished local file and its `IndexRow`s. Tensor columns are binary, non-null,
PLAIN and uncompressed, so the bytes in the file are those in memory; other columns are zstd.
"""

from __future__ import annotations

import json
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import BuildError
from pipeline.format.columns import SCALARS, parquet_schema
from pipeline.format.index import METADATA_KEY, UNPLACED, IndexRow, index_row
from pipeline.format.stored import bytes_column, is_tensor, stored_names, tensor_column
from pipeline.writer.parquet_pages import StreamedPage, point_footer_at, write_page

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pipeline.format.columns import LatentRow
    from pipeline.format.tensors import Payload

MAX_VALUE_BYTES = 2**31 - 2**20
"""A Parquet page, hence a value, must stay below 2 GiB."""

STREAM_BYTES = 16 * 1024 * 1024
"""Tensors of this size or more bypass Arrow's page buffers, if they are the only row of a row group."""

_REPEATING = ["media_type", "bucket", "variant", "source_uri", "codec", "color_matrix", "color_range", "fingerprint"]
_WITH_STATISTICS = ["id", "bucket", "num_frames", "source_hash", "fingerprint"]
_NEEDLE = 32  # payload bytes that, with the length before them, identify a value in its column chunk
_PAGE_HEADER = 4096  # largest gap searched between two values; page headers without statistics are under 100 bytes


@dataclass(frozen=True, slots=True)
class _Sought:
    """Value whose offset is searched in the finished file."""

    needle: bytes
    length: int


class ParquetFileBuilder:
    """Builder of one file of one bucket. Holds one row group, and Arrow's page buffers of twice the largest tensor in it.

    A row of `stream_bytes` or more that is the only one of its row group is streamed: memory does not depend on its length.
    """

    suffix = ".parquet"

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        *,
        moments: bool,
        store: Collection[str] = (),
        without: Collection[str] = (),
        stream_bytes: int = STREAM_BYTES,
    ) -> None:
        """`moments`, `store`, `without`: as of `parquet_schema`."""
        self._path = path
        self._stream_bytes = stream_bytes
        self._names = stored_names(moments=moments, store=store)
        schema = parquet_schema(moments=moments, store=store, without=without)
        self._null = [item for item in schema if item.name.rpartition("_")[0] in without]
        tensors = [bytes_column(name) for name in self._names]
        self._schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression={name: "NONE" if name in tensors else "ZSTD" for name in _leaves(schema)},
            use_dictionary=_REPEATING + [f"{tensor_column(name)}_dtype" for name in self._names if is_tensor(name)],
            write_statistics=_WITH_STATISTICS,
            write_page_index=True,
            write_page_checksum=True,
            data_page_version="1.0",
        )
        self._pages: list[StreamedPage] = []
        self._rows: list[tuple[IndexRow, dict[str, _Sought]]] = []
        self._groups: list[int] = []
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Tensor bytes written so far."""
        return self._num_bytes

    def append(self, rows: Sequence[LatentRow]) -> None:
        """Writes `rows` as one row group, in the order given."""
        columns: dict[str, Any] = {"id": pa.array([row.id for row in rows], pa.string())}
        large = [name for name, tensor in rows[0].tensors.items() if tensor.num_bytes >= self._stream_bytes]
        streamed = large if len(rows) == 1 else []
        for name in self._names:
            columns |= _tensor_columns(name, [row.tensors[name] for row in rows], name in streamed)
        columns |= {item.name: pa.nulls(len(rows), item.type) for item in self._null}
        columns |= {name: pa.array([row.scalars[name] for row in rows], kind) for name, kind in SCALARS.items()}
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(rows))
        for name in streamed:
            self._pages.append(self._write_page(bytes_column(name), rows[0].tensors[name]))
        self._groups.append(len(rows))
        self._num_bytes += sum(row.num_bytes for row in rows)
        for row in rows:
            self._rows.append((index_row(row, len(self._rows), dict.fromkeys(self._names, UNPLACED)), _sought(row)))

    def close(self) -> list[IndexRow]:
        """Finishes the file and finds the offset of every tensor.

        Raises:
            BuildError: the file does not have the documented layout (a bug, or an Arrow version that writes another one).
        """
        self._writer.close()
        self._sink.close()
        if self._pages:
            point_footer_at(self._path, self._pages)
        places = {name: self._find(name) for name in self._names}
        return [
            row.placed({name: offsets[i] for name, offsets in places.items()}) for i, (row, _) in enumerate(self._rows)
        ]

    def discard(self) -> None:
        """Stops writing and deletes the file; safe at any time."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes a footer; the file is discarded, so errors are ignored
            self._writer.close()
        self._sink.close()

    def _write_page(self, column: str, tensor: Payload) -> StreamedPage:
        """Writes the page after its row group. Spark assigns a row group to the reader of the byte range that contains the row group's
        middle, counted from its first column (ADR 13).
        """
        number = self._schema.get_field_index(column)  # each field is one Parquet column, lists too
        return write_page(self._sink.write, tensor, at=self._sink.tell(), row_group=len(self._groups), column=number)

    def _find(self, name: str) -> list[int]:
        footer = pq.read_metadata(self._path)
        counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        if counts != self._groups:
            raise BuildError(f"{self._path.name} has row groups of {counts} rows, wrote {self._groups}", stage="write")
        column = self._schema.get_field_index(bytes_column(name))
        places: list[int] = []
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for group, count in enumerate(counts):
                at = footer.row_group(group).column(column).data_page_offset
                for _, sought in self._rows[len(places) : len(places) + count]:
                    value = sought[name]
                    found = content.find(value.needle, at, at + _PAGE_HEADER + len(value.needle))
                    if found < 0:
                        raise BuildError(
                            f"tensor {len(places)} of {self._path.name} is not contiguous at {at}", stage="write"
                        )
                    places.append(found + 4)
                    at = found + 4 + value.length
        return places


def _leaves(schema: pa.Schema) -> list[str]:
    """Column paths as Parquet names them: a list column's leaf is `name.list.element`."""
    return [f"{item.name}.list.element" if pa.types.is_list(item.type) else item.name for item in schema]


def _tensor_columns(name: str, tensors: list[Payload], streamed: bool) -> dict[str, Any]:
    # A streamed tensor is an empty placeholder here; its page follows the row group.
    arrays = [pa.array([b""], pa.binary())] if streamed else [_binary_of_one(tensor) for tensor in tensors]
    columns: dict[str, Any] = {bytes_column(name): pa.chunked_array(arrays, pa.binary())}
    if is_tensor(name):
        prefix = tensor_column(name)
        columns[f"{prefix}_shape"] = pa.array([tensor.shape for tensor in tensors], pa.list_(pa.int64()))
        columns[f"{prefix}_dtype"] = pa.array([tensor.dtype for tensor in tensors], pa.string())
    return columns


def _binary_of_one(tensor: Payload) -> pa.Array:
    """The tensor's memory as a binary array of length one: no copy, and Arrow ends pages between chunks, not only every 1024 rows."""
    offsets = np.array([0, tensor.num_bytes], np.int32)
    return pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(tensor.data)])


def _sought(row: LatentRow) -> dict[str, _Sought]:
    return {
        name: _Sought(tensor.num_bytes.to_bytes(4, "little") + bytes(tensor.data[:_NEEDLE]), tensor.num_bytes)
        for name, tensor in row.tensors.items()
    }

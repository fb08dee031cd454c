"""Side index of a data file: one row per clip with the byte range of every tensor, so that readers fetch ranges without parsing the file.

Written from the `IndexRow`s of a finished data file as Parquet, and read back as rows and `Span`s. The same for both containers.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.stored import LATENT, LOGVAR, is_tensor, tensor_shape
from pipeline.format.tensors import Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pipeline.format.columns import LatentRow

METADATA_KEY = b"latentset"
UNPLACED = -1
"""Offset of a tensor whose position is not known yet."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("latent_offset", pa.int64(), nullable=False),
        pa.field("latent_length", pa.int64(), nullable=False),
        pa.field("latent_hash", pa.string(), nullable=False),
        pa.field("logvar_offset", pa.int64()),
        pa.field("logvar_length", pa.int64()),
        pa.field("logvar_hash", pa.string()),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("num_frames", pa.int64(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("source_hash", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
    ]
)


def index_schema(others: Sequence[str]) -> pa.Schema:
    """Columns of an index of rows that also store `others`, names of `format.stored` but latent and log-variance."""
    fields = [
        pa.field(f"{name}_{part}", kind, nullable=False)
        for name in others
        for part, kind in (("offset", pa.int64()), ("length", pa.int64()), ("hash", pa.string()))
    ]
    return pa.schema([*INDEX_SCHEMA, *fields])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's tensor or image lies: offset and length in bytes, BLAKE2b-128 in hex."""

    name: str
    offset: int
    length: int
    hash: str


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One row of a data file: offsets and lengths in bytes from the start of the file, hashes BLAKE2b-128 in hex.

    `others`: what the row stores besides latent and log-variance, in file order.
    """

    id: str
    row: int
    latent_offset: int
    latent_length: int
    latent_hash: str
    logvar_offset: int | None
    logvar_length: int | None
    logvar_hash: str | None
    shape: tuple[int, ...]
    dtype: str
    bucket: str
    num_frames: int
    source_uri: str
    source_key: str
    source_hash: str
    caption: str | None
    others: tuple[Place, ...] = ()

    def placed(self, offsets: Mapping[str, int]) -> IndexRow:
        """The row with these offsets of what it stores, by name."""
        others = tuple(replace(place, offset=offsets[place.name]) for place in self.others)
        return replace(self, latent_offset=offsets[LATENT], logvar_offset=offsets.get(LOGVAR), others=others)

    def spans(self) -> list[Span]:
        """The row's tensors as byte ranges."""
        found = [Span(self.id, self.latent_offset, self.latent_length, self.dtype, self.latent_hash, self.shape)]
        if self.logvar_offset is not None and self.logvar_length is not None and self.logvar_hash is not None:
            found.append(
                Span(self.id, self.logvar_offset, self.logvar_length, self.dtype, self.logvar_hash, self.shape)
            )
        for place in self.others:
            dtype = self.dtype if is_tensor(place.name) else None
            shape = tensor_shape(place.name, self.shape)
            found.append(Span(self.id, place.offset, place.length, dtype, place.hash, shape))
        return found


def index_row(row: LatentRow, position: int, offsets: Mapping[str, int]) -> IndexRow:
    """The index entry of `row`, which is the `position`-th of its file. `offsets`: of what it stores, by name."""
    logvar = row.tensors.get(LOGVAR)
    others = [(name, tensor) for name, tensor in row.tensors.items() if name not in (LATENT, LOGVAR)]
    return IndexRow(
        id=row.id,
        row=position,
        latent_offset=offsets[LATENT],
        latent_length=row.latent.num_bytes,
        latent_hash=row.latent.hash,
        logvar_offset=offsets[LOGVAR] if logvar else None,
        logvar_length=logvar.num_bytes if logvar else None,
        logvar_hash=logvar.hash if logvar else None,
        shape=row.latent.shape,
        dtype=row.latent.dtype,
        bucket=row.scalars["bucket"],
        num_frames=row.num_frames,
        source_uri=row.scalars["source_uri"],
        source_key=row.scalars["source_key"],
        source_hash=row.scalars["source_hash"],
        caption=row.scalars["caption"],
        others=tuple(Place(name, offsets[name], tensor.num_bytes, tensor.hash) for name, tensor in others),
    )


def write_index(path: Path, rows: Sequence[IndexRow], metadata: dict[str, Any]) -> None:
    """Writes the side index. `metadata` (JSON-ready: key, size and hash of the data file) goes to its key-value metadata."""
    others = [place.name for place in rows[0].others] if rows else []
    schema = index_schema(others).with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    table = pa.Table.from_pylist([_described(row) for row in rows], schema=schema)
    pq.write_table(table, path, compression="zstd", data_page_version="1.0", write_page_checksum=True)


def read_index(data: bytes) -> tuple[list[IndexRow], dict[str, Any]]:
    """Rows in file order and the index's metadata.

    Raises:
        ValueError: not a side index (`pyarrow.ArrowInvalid` is one), or it has other columns than `index_schema`.
    """
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"null"))
    others = [name.removesuffix("_offset") for name in table.column_names[len(INDEX_SCHEMA) :: 3]]
    if table.column_names != (names := index_schema(others).names) or not isinstance(metadata, dict):
        raise ValueError(f"not a side index: has the columns {table.column_names}, expected {names}")
    return [_row(values, others) for values in table.to_pylist()], metadata


def _described(row: IndexRow) -> dict[str, Any]:
    """Columns of one row."""
    found = {item.name: getattr(row, item.name) for item in fields(row) if item.name != "others"}
    for place in row.others:
        found |= {f"{place.name}_{part}": getattr(place, part) for part in ("offset", "length", "hash")}
    return found


def _row(values: dict[str, Any], others: Sequence[str]) -> IndexRow:
    """Inverse of `_described`."""
    places = [Place(name, *(values.pop(f"{name}_{part}") for part in ("offset", "length", "hash"))) for name in others]
    return IndexRow(**{**values, "shape": tuple(values["shape"])}, others=tuple(places))


def read_footer(file: io.RawIOBase, name: str) -> tuple[pq.FileMetaData, dict[str, Any] | None]:
    """Footer of an open Parquet file, and its `latentset` metadata if it has any. Reads the footer only.

    Raises:
        InputError: not Parquet, or damaged; the message has `name`.
    """
    try:
        footer = pq.ParquetFile(pa.PythonFile(file, mode="r")).metadata
        raw = (footer.metadata or {}).get(METADATA_KEY)
        return footer, None if raw is None else json.loads(raw)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{name} cannot be read as Parquet: {error}") from None

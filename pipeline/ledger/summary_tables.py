"""Summaries of receipts as Parquet: cache objects in the output, and the file that publishing works on."""

from __future__ import annotations

import io
import itertools
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pipeline.ledger.summary import URI_BYTES, ReceiptSummary
from pipeline.storage import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

IDENTITY = ["key", "size", "etag"]
ROWS_AT_ONCE = 4096  # of a cache object between Arrow and Python objects
CACHE_VERSION = b"2"  # of the way a summary is made; entries of others are read again


def summary_schema() -> Any:
    """Arrow schema with a column for each field of `ReceiptSummary`."""
    import pyarrow as pa  # not at import time: most outputs have no cache, and `lathe status` should start quickly

    kinds = {"int": pa.int64(), "bytes": pa.binary(), "str": pa.string(), "str | None": pa.string()}
    columns = [pa.field(item.name, kinds[str(item.type)]) for item in fields(ReceiptSummary)]
    return pa.schema(columns, metadata={b"lathe": CACHE_VERSION})


def batch_of(found: list[ReceiptSummary]) -> pa.RecordBatch:
    """Summaries as a record batch."""
    import pyarrow as pa

    schema = summary_schema()
    columns = [pa.array([getattr(item, each.name) for item in found], each.type) for each in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def to_parquet(found: list[ReceiptSummary]) -> bytes:
    """Contents of a cache object."""
    import pyarrow.parquet as pq

    out = io.BytesIO()
    with pq.ParquetWriter(out, summary_schema(), compression="zstd") as writer:
        for at in range(0, max(len(found), 1), ROWS_AT_ONCE):
            writer.write_batch(batch_of(found[at : at + ROWS_AT_ONCE]))
    return out.getvalue()


def read_summaries(path: Path, rows: np.ndarray) -> list[ReceiptSummary]:
    """Summaries at these ascending rows of a file that `Summaries.spool` wrote."""
    import pyarrow.parquet as pq

    found: list[ReceiptSummary] = []
    first = at = 0
    for batch in summary_batches(pq.ParquetFile(path)) if len(rows) else ():
        end = at + int(rows[at:].searchsorted(first + batch.num_rows))
        if end > at:
            found += summaries_of(batch.take(rows[at:end] - first))
        first, at = first + batch.num_rows, end
    return found


def rows_naming(table: pa.Table, uris: Collection[bytes]) -> np.ndarray:
    """Ascending rows of a table with the column `uris` whose receipts name one of these sources, given as `uri_id`s."""
    import numpy as np
    import pyarrow.compute as pc

    named = np.frombuffer(b"".join(table["uris"].to_pylist()), "<u8")
    rows = np.repeat(np.arange(table.num_rows), pc.binary_length(table["uris"]).to_numpy() // URI_BYTES)
    return np.unique(rows[np.isin(named, np.frombuffer(b"".join(uris), "<u8"))])


def summary_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """By row groups: `iter_batches` keeps what it has read until the end."""
    for number in range(file.num_row_groups):
        yield from file.read_row_group(number, use_threads=False).to_batches(ROWS_AT_ONCE)


def summaries_of(batch: pa.RecordBatch) -> Iterator[ReceiptSummary]:
    """Rows of a record batch as objects."""
    return itertools.starmap(ReceiptSummary, zip(*(column.to_pylist() for column in batch), strict=True))


def infos_of(batches: list[pa.RecordBatch]) -> Iterator[ObjectInfo]:
    """Objects listed in batches with the columns `IDENTITY`."""
    for batch in batches:  # an object for each at once would take 300 bytes a receipt
        for key, size, etag in zip(*(column.to_pylist() for column in batch), strict=True):
            yield ObjectInfo(key, size, etag, 0.0)


def joined(batch: pa.RecordBatch | pa.Table) -> Any:
    """One string for key, size and etag."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(batch["key"], pc.cast(batch["size"], pa.string()), batch["etag"], "\n")


def object_names(file: pq.ParquetFile) -> pa.Array:
    """`joined` of every row of a cache object."""
    import pyarrow as pa

    parts = [joined(batch) for batch in file.read(IDENTITY, use_threads=False).to_batches()]
    return pa.concat_arrays([pa.array([], pa.string()), *parts])


def open_cache(data: bytes) -> pq.ParquetFile | None:
    """A cache object; None where it is damaged or has other columns: those receipts are read again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(summary_schema(), check_metadata=True):
            return None
        for _ in summary_batches(file):  # damage shows here
            pass
        return file
    except (pa.ArrowException, OSError):
        return None


def from_parquet(data: bytes) -> list[ReceiptSummary]:
    """Entries of a cache object; none where it is damaged or has other columns."""
    file = open_cache(data)
    return [] if file is None else [item for batch in summary_batches(file) for item in summaries_of(batch)]

"""Tables of a snapshot: data files and receipts that count, inputs whose version was chosen, what is open. Parquet; no access to stores.

`FILES` is for readers. `RECEIPTS` and `CHOICES` let the next snapshot be made without reading these receipts again.
"""

from __future__ import annotations

import json
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger.versions import Chosen
from pipeline.records import ChannelStats, Counts, WrittenFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pipeline.ledger.counted import Share
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.versions import Choices

ROWS_AT_ONCE = 4096
ROW_GROUP = 16384
SPOOLED_AT_ONCE = 1024  # rows that are Python objects, 2 kB each
COUNTS = tuple(Counts.__slots__)

FILES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("index_key", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # that count
        pa.field("frames", pa.int64(), nullable=False),  # of rows that count
        pa.field("bytes", pa.int64(), nullable=False),  # of the file
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("index_bytes", pa.int64(), nullable=False),
        pa.field("index_sha256", pa.string(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("network", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("file_rows", pa.int64(), nullable=False),  # in the file
        pa.field("file_frames", pa.int64(), nullable=False),
        pa.field("ranges", pa.string(), nullable=False),  # JSON: `WrittenFile.ranges`
        pa.field("hidden", pa.list_(pa.int32()), nullable=False),  # positions in the file of rows that do not count
    ]
)
RECEIPTS = pa.schema(
    [
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("state", pa.binary(8), nullable=False),  # `Overlaps.state`
        pa.field("own_shard", pa.bool_(), nullable=False),  # false for retries and `unchanged` receipts
        pa.field("rejects", pa.string(), nullable=False),  # JSON: by reason
        pa.field("warnings", pa.string(), nullable=False),  # JSON: `Receipt.warnings`; empty if some rows do not count
        pa.field("problem", pa.string()),  # first inconsistent count
        pa.field("stats", pa.binary()),  # `pack_stats`, of the rows that count; null if none does
        *(pa.field(name, pa.int64(), nullable=False) for name in COUNTS),
        pa.field("videos", pa.string()),  # JSON: `CountedReceipt.videos`
    ]
)
ADDED_LATER = ("videos",)
"""Columns that tables of earlier versions lack: they are null there."""
CHOICES = pa.schema(
    [
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("uri_id", pa.binary(8), nullable=False),
        pa.field("shard_id", pa.string()),  # null: the input is dropped
        pa.field("named_by", pa.string(), nullable=False),  # shard id: `versions.Chosen.named_by`
    ]
)
OPEN = pa.schema([pa.field("name", pa.string(), nullable=False)])  # as in `Snapshot.open_shards`


class TableSpool:
    """Parquet file written from single rows. 100,000 rows as Python objects would be ten times as large as in Arrow."""

    def __init__(self, schema: pa.Schema, path: Path) -> None:
        self._schema, self._path = schema, path
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        """Adds one row."""
        self._rows.append(row)
        if len(self._rows) >= SPOOLED_AT_ONCE:
            self._flush()

    def finish(self) -> Path:
        """Writes the rest and closes the file. Returns its path."""
        self._flush()
        self._writer.close()
        return self._path

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, self._schema))
            self._rows = []


def sort_order(names: pa.ChunkedArray) -> pa.Array | None:
    """Positions that sort the column; None if it is sorted."""
    if pc.all(pc.less_equal(names[:-1], names[1:])).as_py() is not False:
        return None
    return pc.array_sort_indices(names)


def file_row(part: CountedReceipt, share: Share) -> dict[str, Any]:
    """One row of `FILES`."""
    item, receipt = share.file, part.receipt
    return {
        "key": item.key,
        "index_key": item.index_key,
        "bucket": item.bucket,
        "rows": share.rows,
        "frames": share.frames,
        "bytes": item.num_bytes,
        "sha256": item.sha256,
        "index_bytes": item.index_bytes,
        "index_sha256": item.index_sha256,
        "shard_id": receipt.shard_id,
        "network": str(receipt.fingerprint_parts.get("encoder", {}).get("network", "")),
        "fingerprint": receipt.fingerprint,
        "file_rows": item.rows,
        "file_frames": item.frames,
        "ranges": json.dumps(item.ranges, sort_keys=True) if item.ranges else "{}",
        "hidden": share.hidden,
    }


def written_file(row: dict[str, Any]) -> WrittenFile:
    """The file that a row of `FILES` names."""
    return WrittenFile(
        key=row["key"],
        index_key=row["index_key"],
        bucket=row["bucket"],
        num_bytes=row["bytes"],
        index_bytes=row["index_bytes"],
        rows=row["file_rows"],
        sha256=row["sha256"],
        index_sha256=row["index_sha256"],
        frames=row["file_frames"],
        ranges=json.loads(row["ranges"]),
    )


def receipt_row(
    part: CountedReceipt, counts: Counts, stats: ChannelStats | None, state: bytes, problem: str | None
) -> dict[str, Any]:
    """One row of `RECEIPTS`. `counts` and `stats` of the part that counts."""
    receipt = part.receipt
    rejects: dict[str, int] = {}
    for reject in receipt.rejects:
        if part.reject_counts(reject):
            rejects[reject.reason] = rejects.get(reject.reason, 0) + 1
    return {
        "shard_id": receipt.shard_id,
        "fingerprint": receipt.fingerprint,
        "state": state,
        "own_shard": receipt.shard.retry is None and not receipt.same_as and not part.superseded,
        "rejects": json.dumps(rejects, sort_keys=True),
        "warnings": json.dumps(receipt.warnings if part.whole else {}, sort_keys=True),
        "problem": problem,
        "stats": pack_stats(stats) if stats is not None else None,
        **{name: getattr(counts, name) for name in COUNTS},
        "videos": json.dumps(part.videos(), sort_keys=True),
    }


def pack_stats(stats: ChannelStats) -> bytes:
    """Statistics as float64, little-endian: n, then mean, m2, min and max, each for all channels."""
    values = (stats.n, *stats.mean, *stats.m2, *stats.min, *stats.max)
    return struct.pack(f"<{len(values)}d", *values)


def stats_arrays(packed: Iterable[bytes]) -> np.ndarray:
    """Packed statistics of receipts of one network as float64 `(receipts, 1 + 4 channels)`, in the order of `pack_stats`."""
    data = b"".join(packed_list := list(packed))
    return np.frombuffer(data, "<f8").reshape(len(packed_list), -1) if packed_list else np.empty((0, 1))


def merged_stats(parts: Iterable[np.ndarray]) -> ChannelStats | None:
    """Statistics of all receipts together, from `stats_arrays`; None if there are none."""
    merged: ChannelStats | None = None
    for values in parts:
        n = values[:, :1]
        mean, m2, low, high = np.split(values[:, 1:], 4, axis=1)
        total = float(n.sum())
        centre = (n * mean).sum(0) / total
        spread = m2.sum(0) + (n * (mean - centre) ** 2).sum(0)
        found = ChannelStats(int(total), *(tuple(each.tolist()) for each in (centre, spread, low.min(0), high.max(0))))
        merged = found if merged is None else merged.merge(found)
    return merged


def packed_stats(receipts: Path, fingerprint: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Shard ids and `stats_arrays` of receipts of one fingerprint that have statistics, from a file of `RECEIPTS`, batch by batch."""
    columns = ["shard_id", "fingerprint", "stats"]
    for batch in read_batches(receipts, columns):
        mine = batch.filter(pc.and_(pc.equal(batch["fingerprint"], fingerprint), pc.is_valid(batch["stats"])))
        if mine.num_rows:
            yield mine["shard_id"].to_pylist(), stats_arrays(mine["stats"].to_pylist())
    release_memory()


def choice_rows(choices: Choices) -> Iterator[dict[str, Any]]:
    """Rows of `CHOICES`, sorted."""
    for fingerprint, found in sorted(choices.items()):
        for uri, (shard, named_by) in sorted(found.items()):
            yield {"fingerprint": fingerprint, "uri_id": uri, "shard_id": shard, "named_by": named_by}


def read_choices(table: pa.Table) -> Choices:
    """Inverse of `choice_rows`."""
    found: Choices = {}
    for row in table.to_pylist():
        found.setdefault(row["fingerprint"], {})[row["uri_id"]] = Chosen(row["shard_id"], row["named_by"])
    return found


def write_table(table: pa.Table, path: Path, sort_by: str | None = None) -> Path:
    """Writes the table as a Parquet file, zstd, sorted by one column; equal tables give equal bytes.

    Rows are put in order a row group at a time: a sorted copy would take the memory of the table again.
    """
    order = None if sort_by is None else sort_order(table[sort_by])
    with pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True) as writer:
        for at in range(0, max(table.num_rows, 1), ROW_GROUP):
            group = table.slice(at, ROW_GROUP) if order is None else table.take(order.slice(at, ROW_GROUP))
            writer.write_table(group, ROW_GROUP)
    return path


def read_table(path: Path, columns: list[str] | None = None, repeated: list[str] | None = None) -> pa.Table:
    """The table of a local Parquet file, read in this thread: memory that Arrow's threads free is kept by each of them.

    Columns named by `repeated` become dictionaries: their values are few.
    """
    return pq.ParquetFile(path, read_dictionary=repeated).read(columns, use_threads=False)


def read_batches(source: Path | bytes, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The same by row groups, of a file or its bytes. `iter_batches` keeps what it has read until the end: 80 MB for 100,000 receipts."""
    whole = isinstance(source, bytes)
    file = pq.ParquetFile(pa.BufferReader(source) if whole else source, page_checksum_verification=whole)
    for number in range(file.num_row_groups):
        yield from file.read_row_group(number, columns, use_threads=False).to_batches(ROWS_AT_ONCE)


def completed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with null in columns of `schema` that it lacks."""
    there = set(batch.schema.names)
    columns = [batch[field.name] if field.name in there else pa.nulls(batch.num_rows, field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def release_memory() -> None:
    """Gives memory that Arrow and the C library hold but do not use back to the system: the next step allocates other sizes."""
    for pool in (pa.default_memory_pool(), pa.system_memory_pool()):  # the second is malloc, of Python too
        pool.release_unused()


@contextmanager
def arrow_on_malloc() -> Iterator[None]:
    """Arrow allocates by malloc, of which `release_memory` gives back what is free: 286 MB at most for 100,000 receipts, not 331."""
    before = pa.default_memory_pool()
    try:
        yield pa.set_memory_pool(pa.system_memory_pool())
    finally:
        pa.set_memory_pool(before)


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a file that `write_table` or `TableSpool` made.

    Raises:
        ValueError: not Parquet (`pyarrow.ArrowInvalid` is one), or damaged.
    """
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(columns, use_threads=False)


def column_names(data: bytes) -> list[str]:
    """Names of the columns of a table, as Parquet."""
    return list(pq.read_schema(pa.BufferReader(data)).names)

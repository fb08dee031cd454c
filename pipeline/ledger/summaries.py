"""Summaries of receipts with the facts that a resumed run needs, cached in the output so that resuming reads few receipts.

Takes the store of an output, returns one `ReceiptSummary` per readable receipt object. `_summaries/{hash}.cache` holds those of earlier
runs; an entry is used only if the LIST still has that receipt with that size and etag. Without the cache, receipts are read again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound
from pipeline.format.columns import storable
from pipeline.ledger.receipts import Ledger
from pipeline.records import Retry, SourceObject, retry_from_dict
from pipeline.storage import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.format.layout import Layout
    from pipeline.records import Receipt
    from pipeline.storage import Store

SPOOLED_AT_ONCE = 1024  # summaries between objects and a row group
LISTED_AT_ONCE = 16384
IDENTITY = ["key", "size", "etag"]
ROWS_AT_ONCE = 4096  # of a cache object between Arrow and Python objects
MIN_UNCACHED_RECEIPTS = 256  # receipts read one by one, from which on a cache object is written
CACHE_VERSION = b"2"  # of the way a summary is made; entries of others are read again
ID_BYTES = 16
URI_BYTES = 8
DAMAGED, EMPTY = 1, 2
UNKNOWN_CONTENT = bytes(ID_BYTES)


@dataclass(frozen=True, slots=True)
class ReceiptSummary:
    """Summary of one receipt object. Sources are hashes: a corpus may have millions, and they are only compared."""

    key: str
    size: int
    etag: str
    shard_id: str
    fingerprint: str
    created: str
    attempt: str
    sources: bytes = field(repr=False)  # `source_id` of each object, concatenated
    uris: bytes = field(repr=False)  # `uri_id` of each object, concatenated
    contents: bytes = field(repr=False)  # `content_id` of each object, concatenated
    retry: str | None  # JSON of `Retry`
    same_as: str | None  # JSON: for each object the shard of an older version with equal bytes, see `Receipt.same_as`
    container: str  # "parquet", "tar", or "" if nothing was written
    samples: int  # these four as `Receipt.added`
    clips: int
    damaged: int
    damaged_regions: int
    marks: bytes = field(repr=False)  # of plain files, for each object the sum of DAMAGED and EMPTY
    reasons: str  # JSON: rejects by reason
    limits: str  # JSON: see `Receipt.limits`

    def __post_init__(self) -> None:
        # Mostly equal over 100,000 receipts: stored once.
        for name in ("fingerprint", "container", "reasons", "limits"):
            object.__setattr__(self, name, sys.intern(getattr(self, name)))

    @property
    def precedence(self) -> tuple[str, str]:
        """As `receipts.precedence`."""
        return self.created, self.attempt

    def source_ids(self) -> list[bytes]:
        """`source_id` of each object."""
        return [self.sources[at : at + ID_BYTES] for at in range(0, len(self.sources), ID_BYTES)]

    def content_ids(self) -> list[bytes]:
        """`content_id` of each object."""
        return [self.contents[at : at + ID_BYTES] for at in range(0, len(self.contents), ID_BYTES)]

    def uri_ids(self) -> list[bytes]:
        """`uri_id` of each object."""
        return [self.uris[at : at + URI_BYTES] for at in range(0, len(self.uris), URI_BYTES)]

    def positions(self) -> dict[bytes, int]:
        """Positions of the objects, by `uri_id`."""
        return {uri: position for position, uri in enumerate(self.uri_ids())}

    def retried(self) -> Retry | None:
        """The retry, if this is the receipt of one."""
        if self.retry is None:
            return None
        return retry_from_dict(json.loads(self.retry))


def source_id(source: SourceObject) -> bytes:
    """16-byte hash of URI, size and etag."""
    text = f"{source.uri}\0{source.size}\0{source.etag}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def content_id(source: SourceObject, digest: str | None) -> bytes:
    """16-byte hash of URI, size and digest of the bytes; zeros if the digest is unknown."""
    if digest is None:
        return UNKNOWN_CONTENT
    text = f"{source.uri}\0{source.size}\0{digest}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def uri_id(uri: str) -> bytes:
    """8-byte hash of a URI, as spelled in receipts or in rows."""
    return hashlib.blake2b(storable(uri).encode(), digest_size=URI_BYTES).digest()


def summarise(receipt: Receipt, info: ObjectInfo) -> ReceiptSummary:
    """Summary of a receipt; `info`: its object."""
    retry, added = receipt.shard.retry, receipt.added()
    return ReceiptSummary(
        key=info.key,
        size=info.size,
        etag=info.etag,
        shard_id=receipt.shard_id,
        fingerprint=receipt.fingerprint,
        created=receipt.created,
        attempt=receipt.attempt,
        sources=b"".join(map(source_id, receipt.shard.objects)),
        uris=b"".join(uri_id(source.uri) for source in receipt.shard.objects),
        contents=b"".join(content_id(source, receipt.digests.get(source.uri)) for source in receipt.shard.objects),
        retry=None if retry is None else json.dumps(asdict(retry)),
        same_as=json.dumps([receipt.same_as[source.uri] for source in receipt.shard.objects])
        if receipt.same_as
        else None,
        container=receipt.files[0].key.rpartition(".")[2] if receipt.files else "",
        samples=added.samples,
        clips=added.clips,
        damaged=added.damaged,
        damaged_regions=added.damaged_regions,
        marks=_marks(receipt),
        reasons=json.dumps(Counter(reject.reason for reject in receipt.rejects)),
        limits=json.dumps(receipt.limits, sort_keys=True),
    )


def _marks(receipt: Receipt) -> bytes:
    if receipt.shard.kind == "tar":
        return b""
    damaged, empty = {reject.uri for reject in receipt.rejects if not reject.policy}, set(receipt.empty)
    return bytes(DAMAGED * (source.uri in damaged) + EMPTY * (source.uri in empty) for source in receipt.shard.objects)


class Summaries:
    """Summaries of all present receipts of an output. `all()` reads; `save()` caches those that were read one by one."""

    def __init__(self, store: Store, workers: int = 16, layout: Layout | None = None) -> None:
        self._store = store
        self._workers = workers
        self._ledger = Ledger(store, layout=layout)
        self._cached_objects: list[str] = []
        self._found: list[ReceiptSummary] = []
        self._spooled: Path | None = None
        self._read = 0
        self.cut_off: list[str] = []
        """Shards all of whose receipts are empty or cut off; filled by `all`."""

    def all(self, listener: Callable[[Receipt], None] | None = None) -> list[ReceiptSummary]:
        """One summary per shard: that of the receipt that counts. Cut-off receipts are left out.

        Args:
            listener: called with every receipt that was read because it is not cached.

        Raises:
            OutputError: a receipt of another format version.
        """
        cached = {item.key: item for item in self._cached()}
        found, missing, unreadable = [], [], []
        for info in self._ledger.listed(empty=True):
            item = cached.pop(info.key, None)
            if item is not None and (item.size, item.etag) == (info.size, info.etag):
                found.append(item)
            elif info.size:
                missing.append(info)
            else:
                unreadable.append(info.key)
        cached.clear()
        self._read = len(missing)
        missing.reverse()
        infos = (missing.pop() for _ in range(self._read))  # each is freed after its receipt is read: 300 bytes
        waiting, ahead = itertools.tee(infos)
        receipts = self._ledger.read_all(([info.key] for info in ahead), self._workers)
        for info, receipt in zip(waiting, receipts, strict=True):
            if receipt is None:
                unreadable.append(info.key)
                continue
            found.append(summarise(receipt, info))
            if listener is not None:
                listener(receipt)
        self._found = found
        first = first_of_each_shard(found)
        if unreadable:
            self.cut_off = self._shards(unreadable, {item.shard_id for item in first})
        return first

    def spool(self, path: Path, listener: Callable[[Receipt], None] | None = None) -> Path:
        """As `all`, in columns: writes one row for every receipt object to the Parquet file `path`, several of one shard included.

        Raises:
            OutputError: a receipt of another format version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        cache = [file for data in self._cached_data() if (file := _opened(data)) is not None]
        names = pa.concat_arrays([pa.array([], pa.string()), *(_object_names(file) for file in cache)])
        missing, unreadable, used = self._compared(names)
        self._read, done = sum(batch.num_rows for batch in missing), set()
        with pq.ParquetWriter(path, _schema(), compression="zstd") as writer:
            first = 0
            for batch in (batch for file in cache for batch in _batches(file)):
                kept = batch.filter(pa.array(used[first : first + batch.num_rows]))
                first += batch.num_rows
                if kept.num_rows:
                    writer.write_batch(kept)
            cache.clear()
            waiting, ahead = itertools.tee(_infos(missing))
            receipts = self._ledger.read_all(([info.key] for info in ahead), self._workers)
            rows: list[ReceiptSummary] = []
            for info, receipt in zip(waiting, receipts, strict=True):
                if receipt is None:
                    unreadable.append(info.key)
                    continue
                rows.append(summarise(receipt, info))
                if listener is not None:
                    listener(receipt)
                if len(rows) == SPOOLED_AT_ONCE:
                    writer.write_batch(_batch(rows))
                    rows.clear()
            writer.write_batch(_batch(rows))
        if unreadable:
            done.update(pq.ParquetFile(path).read(["shard_id"])["shard_id"].to_pylist())
        self.cut_off = self._shards(unreadable, done)
        self._spooled = path
        return path

    def _compared(self, names: pa.Array) -> tuple[list[pa.RecordBatch], list[str], np.ndarray]:
        """Listed receipts that the cache lacks (key, size, etag), keys of empty ones, and which entries of the cache still hold."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        used, missing, unreadable = np.zeros(len(names), bool), [], []
        listed = self._ledger.listed(empty=True)
        while infos := list(itertools.islice(listed, LISTED_AT_ONCE)):
            columns = zip(*((info.key, info.size, info.etag) for info in infos), strict=True)
            batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], IDENTITY)
            places = pc.index_in(_joined(batch), names) if len(names) else pa.nulls(len(infos), pa.int32())
            used[places.drop_null().to_numpy()] = True
            unknown = batch.filter(places.is_null())
            unreadable += unknown.filter(pc.equal(unknown["size"], 0))["key"].to_pylist()
            missing.append(unknown.filter(pc.greater(unknown["size"], 0)))
        return missing, unreadable, used

    def _shards(self, unreadable: list[str], done: Collection[str]) -> list[str]:
        names = map(self._ledger.layout.receipt_name, unreadable)
        return sorted({name.shard_id for name in names if name is not None and name.shard_id not in done})

    def save(self) -> None:
        """Writes a cache object if enough receipts were read, and removes those it replaces. Call it when a run ends."""
        if self._read < MIN_UNCACHED_RECEIPTS:
            return
        data = _to_parquet(self._found) if self._spooled is None else self._spooled.read_bytes()
        key = self._ledger.layout.summary_key(hashlib.blake2b(data, digest_size=8).hexdigest())
        self._store.write(key, data)
        for old in self._cached_objects:
            if old != key:
                self._store.delete(old)

    def _cached(self) -> list[ReceiptSummary]:
        return [item for data in self._cached_data() for item in _from_parquet(data)]

    def _cached_data(self) -> Iterator[bytes]:
        layout = self._ledger.layout
        self._cached_objects = [info.key for info in self._store.list(layout.summaries) if layout.is_summary(info.key)]
        for key in self._cached_objects:
            with suppress(NotFound):  # another run has just replaced it
                yield self._store.read(key)


def first_of_each_shard(found: Iterable[ReceiptSummary]) -> list[ReceiptSummary]:
    """Of several receipts of one shard, the one that counts."""
    first: dict[str, ReceiptSummary] = {}
    for item in found:
        if item.shard_id not in first or item.precedence < first[item.shard_id].precedence:
            first[item.shard_id] = item
    return list(first.values())


def _schema() -> Any:
    import pyarrow as pa  # not at import time: most outputs have no cache, and `lathe status` should start quickly

    kinds = {"int": pa.int64(), "bytes": pa.binary(), "str": pa.string(), "str | None": pa.string()}
    columns = [pa.field(item.name, kinds[str(item.type)]) for item in fields(ReceiptSummary)]
    return pa.schema(columns, metadata={b"lathe": CACHE_VERSION})


def _batch(found: list[ReceiptSummary]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = _schema()
    columns = [pa.array([getattr(item, each.name) for item in found], each.type) for each in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _to_parquet(found: list[ReceiptSummary]) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    with pq.ParquetWriter(out, _schema(), compression="zstd") as writer:
        for at in range(0, max(len(found), 1), ROWS_AT_ONCE):
            writer.write_batch(_batch(found[at : at + ROWS_AT_ONCE]))
    return out.getvalue()


def read_summaries(path: Path, rows: np.ndarray) -> list[ReceiptSummary]:
    """Summaries at these ascending rows of a file that `Summaries.spool` wrote."""
    import pyarrow.parquet as pq

    found: list[ReceiptSummary] = []
    first = at = 0
    for batch in _batches(pq.ParquetFile(path)) if len(rows) else ():
        end = at + int(rows[at:].searchsorted(first + batch.num_rows))
        if end > at:
            found += _objects(batch.take(rows[at:end] - first))
        first, at = first + batch.num_rows, end
    return found


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """By row groups: `iter_batches` keeps what it has read until the end."""
    for number in range(file.num_row_groups):
        yield from file.read_row_group(number, use_threads=False).to_batches(ROWS_AT_ONCE)


def _objects(batch: pa.RecordBatch) -> Iterator[ReceiptSummary]:
    return itertools.starmap(ReceiptSummary, zip(*(column.to_pylist() for column in batch), strict=True))


def _infos(batches: list[pa.RecordBatch]) -> Iterator[ObjectInfo]:
    for batch in batches:  # an object for each at once would take 300 bytes a receipt
        for key, size, etag in zip(*(column.to_pylist() for column in batch), strict=True):
            yield ObjectInfo(key, size, etag, 0.0)


def _joined(batch: pa.RecordBatch | pa.Table) -> Any:
    """One string for key, size and etag."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(batch["key"], pc.cast(batch["size"], pa.string()), batch["etag"], "\n")


def _object_names(file: pq.ParquetFile) -> pa.Array:
    import pyarrow as pa

    parts = [_joined(batch) for batch in file.read(IDENTITY, use_threads=False).to_batches()]
    return pa.concat_arrays([pa.array([], pa.string()), *parts])


def _opened(data: bytes) -> pq.ParquetFile | None:
    """A cache object; None where it is damaged or has other columns: those receipts are read again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(_schema(), check_metadata=True):
            return None
        for _ in _batches(file):  # damage shows here
            pass
        return file
    except (pa.ArrowException, OSError):
        return None


def _from_parquet(data: bytes) -> list[ReceiptSummary]:
    """Entries of a cache object; none where it is damaged or has other columns."""
    file = _opened(data)
    return [] if file is None else [item for batch in _batches(file) for item in _objects(batch)]

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
from pipeline.ledger.receipts import Ledger
from pipeline.records import Retry, SourceObject, retry_from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.format.layout import Layout
    from pipeline.records import Receipt
    from pipeline.storage import ObjectInfo, Store

ROWS_AT_ONCE = 4096  # of a cache object between Arrow and Python objects
MIN_UNCACHED_RECEIPTS = 256  # receipts read one by one, from which on a cache object is written
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
        for name in (
            "fingerprint",
            "container",
            "reasons",
            "limits",
        ):  # mostly equal over 100,000 receipts: stored once
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
    """8-byte hash of a URI."""
    return hashlib.blake2b(uri.encode("utf-8", "surrogatepass"), digest_size=URI_BYTES).digest()


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
        first = _first_of_each_shard(found)
        if unreadable:
            done = {item.shard_id for item in first}
            names = map(self._ledger.layout.receipt_name, unreadable)
            self.cut_off = sorted({name.shard_id for name in names if name is not None} - done)
        return first

    def save(self) -> None:
        """Writes a cache object if enough receipts were read, and removes those it replaces. Call it when a run ends."""
        if self._read < MIN_UNCACHED_RECEIPTS:
            return
        data = _to_parquet(self._found)
        key = self._ledger.layout.summary_key(hashlib.blake2b(data, digest_size=8).hexdigest())
        self._store.write(key, data)
        for old in self._cached_objects:
            if old != key:
                self._store.delete(old)

    def _cached(self) -> list[ReceiptSummary]:
        layout = self._ledger.layout
        self._cached_objects = [info.key for info in self._store.list(layout.summaries) if layout.is_summary(info.key)]
        found: list[ReceiptSummary] = []
        for key in self._cached_objects:
            with suppress(NotFound):  # another run has just replaced it
                found += _from_parquet(self._store.read(key))
        return found


def _first_of_each_shard(found: Iterable[ReceiptSummary]) -> list[ReceiptSummary]:
    first: dict[str, ReceiptSummary] = {}
    for item in found:
        if item.shard_id not in first or item.precedence < first[item.shard_id].precedence:
            first[item.shard_id] = item
    return list(first.values())


def _schema() -> Any:
    import pyarrow as pa  # not at import time: most outputs have no cache, and `lathe status` should start quickly

    kinds = {"int": pa.int64(), "bytes": pa.binary(), "str": pa.string(), "str | None": pa.string()}
    return pa.schema([pa.field(item.name, kinds[str(item.type)]) for item in fields(ReceiptSummary)])


def _to_parquet(found: list[ReceiptSummary]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out, schema = io.BytesIO(), _schema()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for at in range(0, max(len(found), 1), ROWS_AT_ONCE):
            part = found[at : at + ROWS_AT_ONCE]
            columns = [pa.array([getattr(item, each.name) for item in part], each.type) for each in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return out.getvalue()


def _from_parquet(data: bytes) -> list[ReceiptSummary]:
    """Entries of a cache object; none if it is damaged or has other columns: those receipts are read again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(_schema()):
            return []
        found: list[ReceiptSummary] = []
        for batch in file.iter_batches(ROWS_AT_ONCE):  # whole columns as Python lists would take twice the memory
            found += itertools.starmap(ReceiptSummary, zip(*(column.to_pylist() for column in batch), strict=True))
        return found
    except (pa.ArrowException, OSError):
        return []

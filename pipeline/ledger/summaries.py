"""Summaries of receipts with the facts that a resumed run needs, cached in the output so that resuming reads few receipts.

Takes the store of an output, returns one `ReceiptSummary` per readable receipt object. `_summaries/{hash}.cache` holds those of earlier
runs; an entry is used only if the LIST still has that receipt with that size and etag. Without the cache, receipts are read again.
"""

from __future__ import annotations

import hashlib
import itertools
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.errors import NotFound
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import ReceiptSummary, first_of_each_shard, summarise
from pipeline.ledger.summary_tables import (
    IDENTITY,
    batch_of,
    from_parquet,
    infos_of,
    joined,
    object_names,
    open_cache,
    summary_batches,
    summary_schema,
    to_parquet,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    import pyarrow as pa

    from pipeline.format.layout import Layout
    from pipeline.records import Receipt
    from pipeline.storage import ObjectInfo, Store

SPOOLED_AT_ONCE = 1024  # summaries between objects and a row group
LISTED_AT_ONCE = 16384
MIN_UNCACHED_RECEIPTS = 256  # receipts read one by one, from which on a cache object is written


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
        found += self._read_now(infos, unreadable, listener)
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

        cache = [file for data in self._cached_data() if (file := open_cache(data)) is not None]
        names = pa.concat_arrays([pa.array([], pa.string()), *(object_names(file) for file in cache)])
        missing, unreadable, used = self._compared(names)
        self._read, done = sum(batch.num_rows for batch in missing), set()
        with pq.ParquetWriter(path, summary_schema(), compression="zstd") as writer:
            first = 0
            for batch in (batch for file in cache for batch in summary_batches(file)):
                kept = batch.filter(pa.array(used[first : first + batch.num_rows]))
                first += batch.num_rows
                if kept.num_rows:
                    writer.write_batch(kept)
            cache.clear()
            rows: list[ReceiptSummary] = []
            for item in self._read_now(infos_of(missing), unreadable, listener):
                rows.append(item)
                if len(rows) == SPOOLED_AT_ONCE:
                    writer.write_batch(batch_of(rows))
                    rows.clear()
            writer.write_batch(batch_of(rows))
        if unreadable:
            done.update(pq.ParquetFile(path).read(["shard_id"])["shard_id"].to_pylist())
        self.cut_off = self._shards(unreadable, done)
        self._spooled = path
        return path

    def _read_now(
        self, infos: Iterable[ObjectInfo], unreadable: list[str], listener: Callable[[Receipt], None] | None
    ) -> Iterator[ReceiptSummary]:
        """Summaries of receipts that are not cached, in order; adds the keys of cut-off ones to `unreadable`."""
        waiting, ahead = itertools.tee(infos)
        receipts = self._ledger.read_all(([info.key] for info in ahead), self._workers)
        for info, receipt in zip(waiting, receipts, strict=True):
            if receipt is None:
                unreadable.append(info.key)
                continue
            yield summarise(receipt, info)
            if listener is not None:
                listener(receipt)

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
            places = pc.index_in(joined(batch), names) if len(names) else pa.nulls(len(infos), pa.int32())
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
        data = to_parquet(self._found) if self._spooled is None else self._spooled.read_bytes()
        key = self._ledger.layout.summary_key(hashlib.blake2b(data, digest_size=8).hexdigest())
        self._store.write(key, data)
        for old in self._cached_objects:
            if old != key:
                self._store.delete(old)

    def _cached(self) -> list[ReceiptSummary]:
        return [item for data in self._cached_data() for item in from_parquet(data)]

    def _cached_data(self) -> Iterator[bytes]:
        layout = self._ledger.layout
        self._cached_objects = [info.key for info in self._store.list(layout.summaries) if layout.is_summary(info.key)]
        for key in self._cached_objects:
            with suppress(NotFound):  # another run has just replaced it
                yield self._store.read(key)

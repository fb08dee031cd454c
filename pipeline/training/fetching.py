"""The bytes of one video at a time, out of shards and folders near and far.

Enters: a `Place`. Leaves: the encoded video as bytes, or the path of a local file. One ranged read per video; those fetched last are kept
within a budget.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import DamagedInput, SourceChanged
from pipeline.reader.spool import Spool
from pipeline.storage import locate, open_store, stat_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.storage import Store
    from pipeline.training.corpus_index import Place


class Fetcher:
    """Fetches for one process. Pickles without what it holds."""

    def __init__(self, storage: StorageConfig, cache_bytes: int) -> None:
        self._storage, self._cache_bytes = storage, cache_bytes
        self._begin()

    def _begin(self) -> None:
        self._stores: dict[str, Store] = {}
        self._spool = Spool(self._storage.spool_bytes)
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._kept_bytes = 0

    def __getstate__(self) -> dict[str, object]:
        return {"_storage": self._storage, "_cache_bytes": self._cache_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    @contextmanager
    def video(self, place: Place) -> Iterator[bytes | str]:
        """The encoded video, for as long as the context lasts.

        Raises:
            SourceChanged: the object is not the one that was listed.
            StorageUnavailable, NotFound, AccessError: as the store.
            DamagedInput: `truncated_shard`, the object ends early.
        """
        if place.whole and not place.source.uri.startswith("s3://"):
            yield self._local(place)
            return
        if (kept := self._kept.get((place.source.uri, place.start))) is not None:
            self._kept.move_to_end((place.source.uri, place.start))
            yield kept
            return
        video = self._spool.hold(self._pieces(place), place.size)
        if isinstance(video, bytes):
            self._keep(place, video)
            yield video
            return
        try:
            yield video
        finally:
            self._spool.drop(video)

    def _local(self, place: Place) -> str:
        found = stat_uri(place.source.uri, self._storage)
        if found.etag != place.source.etag:
            raise SourceChanged(
                f"{place.source.uri} was replaced: listed as {place.source.etag}, now {found.etag}; run again to go on with the new one"
            )
        return os.path.join(*locate(place.source.uri))

    def _pieces(self, place: Place) -> Iterator[bytes]:
        root, key = locate(place.source.uri)
        store = self._stores.setdefault(root, open_store(root, self._storage))
        for at in range(0, place.size, self._storage.part_bytes):
            length = min(self._storage.part_bytes, place.size - at)
            data = store.read_range(key, place.start + at, length, etag=place.source.etag)
            if len(data) < length:
                raise DamagedInput(
                    "truncated_shard", f"bytes {place.start + at} to {place.start + at + length} are not there"
                )
            yield data

    def _keep(self, place: Place, video: bytes) -> None:
        if len(video) > self._cache_bytes:
            return
        self._kept[place.source.uri, place.start] = video
        self._kept_bytes += len(video)
        while self._kept_bytes > self._cache_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)

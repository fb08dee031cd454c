"""Fetcher of single videos from shards and folders, local or remote: as bytes, or as the path of a local file.

One ranged read per video; recently fetched videos are cached within a budget.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import DamagedInput, SourceChanged
from pipeline.reader.spool import Spool
from pipeline.storage import is_remote, locate, open_store, stat_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.storage import Store
    from pipeline.training.corpus_index import Place


class Fetcher:
    """Fetcher of one process. Pickles without its cache and connections."""

    def __init__(self, storage: StorageConfig, cache_bytes: int) -> None:
        self._storage, self._cache_bytes = storage, cache_bytes
        self._reset()

    def _reset(self) -> None:
        self._stores: dict[str, Store] = {}
        self._spool = Spool(self._storage.spool_bytes)
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, object]:
        return {"_storage": self._storage, "_cache_bytes": self._cache_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    @contextmanager
    def video(self, place: Place) -> Iterator[bytes | str]:
        """Context with the encoded video.

        Raises:
            SourceChanged: the object was replaced since it was listed.
            StorageUnavailable, NotFound, AccessError: errors of the store.
            DamagedInput: `truncated_shard`, the object ends early.
        """
        if place.whole and not is_remote(place.source.uri):
            yield self._local(place)
            return
        if (cached := self._cache.get((place.source.uri, place.start))) is not None:
            self._cache.move_to_end((place.source.uri, place.start))
            yield cached
            return
        video = self._spool.hold(self._pieces(place), place.size)
        if isinstance(video, bytes):
            self._add_to_cache(place, video)
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
                f"{place.source.uri} was replaced: listed as {place.source.etag}, now {found.etag}; run again to continue with the new one"
            )
        return os.path.join(*locate(place.source.uri))

    def _pieces(self, place: Place) -> Iterator[bytes]:
        root, key = locate(place.source.uri)
        store = self._stores.setdefault(root, open_store(root, self._storage))
        for offset in range(0, place.size, self._storage.part_bytes):
            length = min(self._storage.part_bytes, place.size - offset)
            data = store.read_range(key, place.start + offset, length, etag=place.source.etag)
            if len(data) < length:
                raise DamagedInput(
                    "truncated_shard", f"bytes {place.start + offset} to {place.start + offset + length} are missing"
                )
            yield data

    def _add_to_cache(self, place: Place, video: bytes) -> None:
        if len(video) > self._cache_bytes:
            return
        self._cache[place.source.uri, place.start] = video
        self._cached_bytes += len(video)
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)

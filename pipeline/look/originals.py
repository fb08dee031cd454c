"""The very frames a stored clip was made from, cut out of its source once more.

Enters: a stored clip and its facts. Leaves: uint8 YUV planes at the clip's size, as the encoder got them, in parts as long as asked for;
or the reason why they cannot be had: the source is gone, has changed, does not open. A plain file is opened where it lies; a tar is read
up to the video.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import DecodeConfig
from pipeline.errors import AccessError, BadDataError, InputError, LatheError, SourceChanged, StorageUnavailable
from pipeline.format.columns import storable
from pipeline.reader import ShardReader
from pipeline.records import Sample, Shard, SourceObject
from pipeline.storage import stat_uri
from pipeline.video.clips import frames_on_screen
from pipeline.video.decode import open_video
from pipeline.video.decode.container import measure
from pipeline.video.decode.planes import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.look.stored import StoredClip
    from pipeline.video.decode import Video

UNAVAILABLE = (InputError, AccessError, SourceChanged, StorageUnavailable, BadDataError)
"""Why an original may be missing without anything being wrong with the output."""


class Originals:
    """Remembers objects that could not be had, so that each is asked for once."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        self._gone: dict[str, LatheError] = {}

    @contextmanager
    def open(self, clip: StoredClip, facts: dict[str, Any]) -> Iterator[ClipFrames]:
        """The frames of `clip`, for as long as the context lasts.

        Raises:
            One of `UNAVAILABLE`: gone, changed, out of reach; says which and what was found.
        """
        source = self._source(clip, facts["source_uri"])
        shard = Shard(clip.receipt.shard.kind, clip.receipt.shard.name, (source,))
        limits = _limits(clip)
        with ShardReader(shard, self._storage, max_video_bytes=limits.max_video_bytes) as reader:
            video = open_video(_sample(reader, clip, facts, limits).video, limits)
            try:
                yield ClipFrames(video, clip, facts)
            finally:
                video.close()

    def _source(self, clip: StoredClip, uri: str) -> SourceObject:
        """The object as it is now: a copied or touched file is fine, the hash of its contents decides."""
        if uri in self._gone:
            raise self._gone[uri]
        found = [source for source in clip.receipt.shard.objects if storable(source.uri) == uri]
        if not found:
            raise InputError(f"{uri} is not among the objects of shard {clip.receipt.shard.name}")
        try:
            info = stat_uri(found[0].uri, self._storage)
        except UNAVAILABLE as error:
            self._gone[uri] = error
            raise
        return SourceObject(found[0].uri, info.size, info.etag)


def _limits(clip: StoredClip) -> DecodeConfig:
    """The policies the clip was decoded under. Limits of size change no pixel and are not recorded; the usual ones hold."""
    return DecodeConfig(**clip.receipt.fingerprint_parts["policies"])


def _sample(reader: ShardReader, clip: StoredClip, facts: dict[str, Any], limits: DecodeConfig) -> Sample:
    """The clip's video: of its key, and of the contents that were encoded. Where it lies in a tar may have changed, keys may repeat."""
    name, others = f"{facts['source_key']} of {facts['source_uri']}", []
    for item in reader:
        if not isinstance(item, Sample):
            continue
        if clip.receipt.shard.kind == "files" or storable(item.key) == facts["source_key"]:
            if (found := measure(item.video, limits)) == clip.row.source_hash:
                return item
            others.append(found)
        reader.release(item)
    if others:
        raise SourceChanged(f"{name} has changed: it hashes to {others[0]}, encoded was {clip.row.source_hash}")
    raise InputError(f"{name} is no longer there: nothing of that key can be read")


class ClipFrames:
    """The frames of one clip, in order: `take` until they are all there."""

    def __init__(self, video: Video, clip: StoredClip, facts: dict[str, Any]) -> None:
        top, left, height, width = facts["crop"]
        self._geometry = Geometry(facts["scaled_height"], facts["scaled_width"], top, left, height, width)
        start, fps = facts["clip_start_frame"], clip.receipt.fingerprint_parts["clips"]["fps"]
        self._video = video
        self._wanted = frames_on_screen(video.times_s, start, start + clip.row.num_frames, fps)
        self._taken = 0
        self.matrix = video.info.color_matrix

    def take(self, count: int) -> np.ndarray:
        """The next `count` frames, fewer at the end: uint8 planes `T 3 H W`, limited range, of the colour matrix `matrix`.

        Raises:
            DamagedInput: the stream breaks.
        """
        part = self._wanted[self._taken : self._taken + count]
        self._taken += len(part)
        return self._video.planes(part, self._geometry)

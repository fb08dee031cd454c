"""Original frames of a stored clip, cut out of its source again.

Takes a stored clip and its facts. Gives uint8 YUV planes at the clip's size, as the encoder received them, in parts of any length; or the
error why not: the source is gone, has changed, or does not open. A plain file is opened in place; a tar is read up to the video.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import DecodeConfig
from pipeline.errors import AccessError, BadDataError, InputError, LatheError, SourceChanged, StorageUnavailable
from pipeline.format.columns import storable
from pipeline.reader import ShardReader
from pipeline.records import ImageRules, MemberRule, Sample, Shard, SourceObject, is_mirrored
from pipeline.storage import stat_uri
from pipeline.video.clips import frames_on_screen
from pipeline.video.decode.container import measure
from pipeline.video.decode.planes import Geometry
from pipeline.video.images import open_media

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.look.stored import StoredClip
    from pipeline.video.decode import Video
    from pipeline.video.images import Pictures

UNAVAILABLE = (InputError, AccessError, SourceChanged, StorageUnavailable, BadDataError)
"""Errors of an original that is missing although the output is intact."""


class Originals:
    """Opens originals. Remembers objects that could not be read, so that each is tried once."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        self._gone: dict[str, LatheError] = {}

    @contextmanager
    def open(self, clip: StoredClip, facts: dict[str, Any]) -> Iterator[ClipFrames]:
        """The frames of `clip`, for as long as the context lasts.

        Raises:
            One of `UNAVAILABLE`: the source is gone, has changed, or cannot be read.
        """
        source = self._source(clip, facts["source_uri"])
        shard = Shard(clip.receipt.shard.kind, clip.receipt.shard.name, (source,))
        limits = _limits(clip)
        images = _images(clip)
        with ShardReader(
            shard,
            self._storage,
            max_video_bytes=limits.max_video_bytes,
            images="skip" if images is None else images.policy,
            members=_members(clip),
        ) as reader:
            video = open_media(_sample(reader, clip, facts, limits).encoded_video, limits, images)
            try:
                yield ClipFrames(video, clip, facts)
            finally:
                video.close()

    def _source(self, clip: StoredClip, uri: str) -> SourceObject:
        """The object as it is now. A copied or touched file is accepted: the hash of the video decides."""
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
    """The policies with which the clip was decoded. Limits of size change no pixel and are not recorded; defaults are used."""
    return DecodeConfig(**clip.receipt.fingerprint_parts["policies"])


def _members(clip: StoredClip) -> MemberRule:
    """The rule of paired videos of a tar, which decides keys. Of plain files the main one alone is read."""
    return MemberRule.of(clip.receipt.fingerprint_parts) if clip.receipt.shard.kind == "tar" else MemberRule()


def _images(clip: StoredClip) -> ImageRules | None:
    """The rules of images of the clip's build, but for its buckets, which the clip has."""
    rules = clip.receipt.fingerprint_parts["clips"].get("images")
    return None if rules is None else ImageRules(**{**rules, "background": tuple(rules["background"]), "buckets": ()})


def _sample(reader: ShardReader, clip: StoredClip, facts: dict[str, Any], limits: DecodeConfig) -> Sample:
    """The clip's video: of its key, and with the contents that were encoded. Its place in a tar may have changed, and keys may repeat."""
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
        raise SourceChanged(
            f"{name} has changed: its hash is {others[0]}, that of the encoded video was {clip.row.source_hash}"
        )
    raise InputError(f"{name} is no longer there: no sample of that key can be read")


class ClipFrames:
    """The frames of one clip, in order, by repeated `take`."""

    def __init__(self, video: Video | Pictures, clip: StoredClip, facts: dict[str, Any]) -> None:
        top, left, height, width = facts["crop"]
        self._geometry = Geometry(facts["scaled_height"], facts["scaled_width"], top, left, height, width)
        start, fps = facts["clip_start_frame"], clip.receipt.fingerprint_parts["clips"]["fps"]
        if video.info.is_image:
            fps = None
        self._video = video
        self._wanted = frames_on_screen(video.times_s, start, start + clip.row.num_frames, fps)
        self._mirrored = is_mirrored(facts["variant"])
        self._taken = 0
        self.matrix = video.info.color_matrix

    def take(self, count: int) -> np.ndarray:
        """The next `count` frames, fewer at the end: uint8 planes `T 3 H W`, limited range, of the colour matrix `matrix`.

        Raises:
            DamagedInput: the stream is damaged.
        """
        part = self._wanted[self._taken : self._taken + count]
        self._taken += len(part)
        planes_T3HW = self._video.planes(part, self._geometry)
        return np.ascontiguousarray(planes_T3HW[..., ::-1]) if self._mirrored else planes_T3HW

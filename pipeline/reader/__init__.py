"""Reader of shards: streams the samples of a tar, or of a group of plain video files, in bounded memory.

Takes a `Shard`, yields `Sample | Reject` in the same order on every read, and counts oddities. A video is held in memory up to
`spool_bytes`, larger ones in a temporary file until `release`. Local video files are not copied: the sample has their path. Names inside
archives are only used as keys, never as paths.

- `tar_stream`, `hashed_stream`, `spool`: a tar read forward; hash of the bytes read; encoded videos in memory or temporary files
- `member_names`, `key_group`, `grouping`, `pairing`: keys of members; members of one key; members as samples; paired videos
- `sidecars`, `texts`, `text_encoding`: texts beside plain videos; captions and JSON made storable; their character encoding
- `annotations`, `spans`: rows of tables and annotated spans put onto samples
- `single_byte`, `east_asian`, `letter_statistics`: readings of bytes in an encoding, scored by the letters of its languages
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import AccessError, NotFound, SourceChanged, StorageUnavailable
from pipeline.reader.grouping import Grouper, count
from pipeline.reader.hashed_stream import HashedStream
from pipeline.reader.key_group import Video, sample_of
from pipeline.reader.member_names import TEXT_EXTENSIONS, member_name, why_skipped
from pipeline.reader.pairing import plain_fault
from pipeline.reader.sidecars import read_sidecars
from pipeline.reader.spool import Spool
from pipeline.reader.tar_stream import CutShort, Damage, Member, TarStream
from pipeline.reader.texts import TEXT_BYTES, Caption, Metadata, parse_caption, parse_metadata
from pipeline.records import (
    MAYBE_STILL,
    MISSING,
    VIDEO_EXTENSIONS,
    MemberRule,
    MemberVideo,
    Reject,
    Sample,
    SourceObject,
)
from pipeline.storage import is_remote, locate, open_source, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from pipeline.config import StorageConfig
    from pipeline.reader.member_names import MemberName
    from pipeline.records import ImagePolicy, MemberObject, Shard
    from pipeline.storage import ReadStream

MiB = 1024 * 1024


def read_samples(
    shard: Shard,
    config: StorageConfig,
    *,
    max_video_bytes: int,
    counters: dict[str, int] | None = None,
    images: ImagePolicy = "skip",
    members: MemberRule | None = None,
) -> Iterator[Sample | Reject]:
    """Like `ShardReader`, but releases each sample when the next is requested."""
    options: dict[str, Any] = {"counters": counters, "images": images, "members": members}
    with ShardReader(shard, config, max_video_bytes=max_video_bytes, **options) as reader:
        for item in reader:
            yield item
            if isinstance(item, Sample):
                reader.release(item)


class ShardReader:
    """Iterator over a shard, once. `release` a sample when its video is no longer needed; `close` at the end, from any thread.

    `images`: whether members of tars that are images by their names are samples. `members`: which videos are paired.

    `counters` is filled while reading: slug -> number (`skipped_appledouble`, `resynced_headers`, `reopened_keys`, …).

    `unread(source, error)` is called for a plain file that cannot be read although others may: refused, deleted or replaced since it was
    listed, or the store failed for `patience_s`. If it returns True, reading goes on with the next file. Otherwise, without it, and for
    tars, the error is raised.

    Raises while iterating:
        StorageUnavailable: the store failed after all tries, or the temporary folder; the shard may be read again.
        SourceChanged: an object is not the one that was listed.
        NotFound: an object does not exist any more.
        AccessError: access to an object is denied.
    """

    def __init__(
        self,
        shard: Shard,
        config: StorageConfig,
        *,
        max_video_bytes: int,
        counters: dict[str, int] | None = None,
        unread: Callable[[SourceObject, Exception], bool] | None = None,
        images: ImagePolicy = "skip",
        members: MemberRule | None = None,
    ) -> None:
        self.counters: dict[str, int] = {} if counters is None else counters
        self._shard = shard
        self._config = config
        self._max_video_bytes = max_video_bytes
        self._images, self._rule = images, members or MemberRule()
        self._spool = Spool(config.spool_bytes)
        self._unread = unread
        self.digests: dict[str, str] = {}  # of a tar, once it is read: URI -> BLAKE2b-128 in hex of the object's bytes
        self._stream: ReadStream | None = None
        self._waited_s = 0.0
        self._received_bytes = 0  # by finished streams, ranges and sidecars
        self._guard = threading.Lock()  # of `_stream` and `_received_bytes`
        self._closed = False
        self._places: dict[
            str, tuple[int, int]
        ] = {}  # name -> first byte and size in an uncompressed tar, for hard links

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for storage so far."""
        return self._waited_s + (self._stream.wait_s if self._stream is not None else 0.0)

    @property
    def received_bytes(self) -> int:
        """Bytes received from storage so far; never shrinks. For any thread."""
        with self._guard:
            return self._received_bytes + (self._stream.received_bytes if self._stream is not None else 0)

    def __iter__(self) -> Iterator[Sample | Reject]:
        items = self._read_tar() if self._shard.kind == "tar" else self._read_files()
        while True:
            try:
                item = next(items, None)
            except ValueError:
                if self._closed:  # `close` was called from another thread
                    return
                raise
            if item is None or self._closed:
                return
            yield item

    def release(self, sample: Sample) -> None:
        """Deletes the temporary files of `sample`, if it has any. Other files are never touched."""
        for video in (sample.video, *(member.video for member in sample.members)):
            if isinstance(video, str):
                self._spool.drop(video)

    def close(self) -> None:
        """Ends reading and deletes temporary files."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        self._spool.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- tars ---------------------------------------------------------------------------------------------------------

    def _read_tar(self) -> Iterator[Sample | Reject]:
        (source,) = self._shard.objects
        grouper = Grouper(source.uri, self.counters, self._rule, self._forget)
        with HashedStream(self._open(source)) as stream:
            for item in TarStream(stream, self.counters):
                if isinstance(item, Damage):
                    yield from self._damage(item, grouper, source)
                else:
                    yield from self._member(item, grouper, source)
            self.digests[source.uri] = stream.finish()
        yield from grouper.drain()

    def _damage(self, damage: Damage, grouper: Grouper, source: SourceObject) -> Iterator[Sample | Reject]:
        if damage.reason == "truncated_shard":
            named = damage.member is not None and why_skipped(damage.member) is None
            member = self._name(damage.member) if named and damage.member is not None else None
            yield from grouper.cut_short(damage.message, member=member)
            return
        grouper.damaged()
        yield Reject(None, "read", damage.reason, damage.message, policy=False, uri=source.uri)

    def _member(self, member: Member, grouper: Grouper, source: SourceObject) -> Iterator[Sample | Reject]:
        name = self._name(member.name)
        skipped = why_skipped(member.name) or _why_no_file(member)
        if skipped is not None or name is None:
            count(self.counters, skipped or "no_extension")
        if name is None or (skipped is not None and not (skipped == "skipped_symlink" and name.is_encoded)):
            return
        if member.name.startswith("/") or ".." in member.name.split("/"):
            count(self.counters, "unsafe_names")
        if not member.name.isascii() and not member.name.endswith(name.path):
            count(self.counters, "non_utf8_names")
        yield from grouper.enter(name)
        if name.is_encoded:
            yield from self._take_video(member, name, grouper, source)
        elif name.extension in TEXT_EXTENSIONS:
            self._take_text(member, name, grouper, source)
        else:
            count(self.counters, "ignored_fields")

    def _take_video(
        self, member: Member, name: MemberName, grouper: Grouper, source: SourceObject
    ) -> Iterator[Sample | Reject]:
        if grouper.ignores(name):
            count(self.counters, "ignored_fields")
            return
        for image in grouper.displaced_by(name):
            count(self.counters, "ignored_fields")
            self._forget(image)
        if (reject := grouper.refusal(name)) is not None:
            yield reject
        elif (loss := grouper.add_video(self._video(member, name, source))) is not None:
            video, reject = loss
            self._forget(video)
            yield reject

    def _forget(self, video: Video) -> None:
        """Deletes the temporary file of a member that is not encoded."""
        if isinstance(video.contents, str):
            self._spool.drop(video.contents)

    def _name(self, name: str) -> MemberName | None:
        return member_name(name, with_images=self._images != "skip")

    def _video(self, member: Member, name: MemberName, source: SourceObject) -> Video:
        """A video or image member with its contents, or the reason why it is not read."""
        if self._images == "only" and not name.is_image and name.extension not in MAYBE_STILL:
            message = f"{name.path} is a video, and images.policy is only"
            return Video(name, None, fault=("not_an_image", message, True))
        if member.info.issym():
            target = member.info.linkname
            message = f"{name.path} is a symbolic link to {target!r}; pack the shard with `tar --dereference`"
            return Video(name, None, fault=("unresolved_symlink", message, False))
        contents = self._contents(member, source)
        if contents is None:
            target = member.info.linkname
            message = f"{name.path} is a hard link to {target!r}, which cannot be read again; pack with `tar --hard-dereference`"
            return Video(name, None, fault=("unresolved_hardlink", message, False))
        size, pieces = contents
        if size == 0:
            return Video(name, None, fault=("empty_video", f"{name.path} has no bytes", False))
        if size > self._max_video_bytes:
            message = f"{name.path} has {size} bytes, the limit is {self._max_video_bytes}"
            return Video(name, None, fault=("too_large", message, True))
        try:
            return Video(name, self._spool.hold(pieces, size), size, self._places.get(member.name))
        except CutShort as error:
            return Video(name, None, fault=("truncated_shard", str(error), False))

    def _take_text(self, member: Member, name: MemberName, grouper: Grouper, source: SourceObject) -> None:
        if not grouper.accepts_text(name):
            count(self.counters, "duplicate_fields")
            return
        contents = self._contents(member, source)
        if contents is None:
            return
        size, pieces = contents
        try:
            data = next(iter(pieces), b"") if size > TEXT_BYTES else b"".join(pieces)
        except CutShort:
            count(self.counters, "cut_texts")
            return
        grouper.add_text(name, _parsed(name.extension, data, size), len(data))

    def _contents(self, member: Member, source: SourceObject) -> tuple[int, Iterable[bytes]] | None:
        """Size and pieces of a member. A hard link's target is read again from the object; None if that is not possible."""
        if not member.info.islnk():
            if member.offset is not None:
                self._places[member.name] = (member.offset, member.size)
            return member.size, member.pieces()
        place = self._places.get(member.info.linkname)
        if place is None:
            count(self.counters, "unresolved_hardlinks")
            return None
        count(self.counters, "resolved_hardlinks")
        self._places[member.name] = place
        return place[1], self._ranges(source, *place)

    def _ranges(self, source: SourceObject, start: int, size: int) -> Iterator[bytes]:
        root, key = locate(source.uri)
        store = open_store(root, self._config)
        for at in range(0, size, self._config.part_bytes):
            length = min(self._config.part_bytes, size - at)
            data = store.read_range(key, start + at, length, etag=source.etag)
            self._received(len(data))
            if len(data) < length:
                raise CutShort(f"bytes {start + at} to {start + at + length} are missing")
            yield data

    # --- plain files --------------------------------------------------------------------------------------------------

    def _read_files(self) -> Iterator[Sample | Reject]:
        for index, source in enumerate(self._shard.objects):
            try:
                item = self._read_file(index, source)
            except (AccessError, NotFound, SourceChanged, StorageUnavailable) as error:
                if self._unread is None or not self._unread(source, error):
                    raise
            else:
                yield item

    def _read_file(self, index: int, source: SourceObject) -> Sample | Reject:
        # Only of the URI: clip ids are made from keys and must not depend on how files are grouped.
        file_name = source.uri.rpartition("/")[2]
        key = _printable(os.path.splitext(file_name)[0])
        extension = source.uri.rpartition(".")[2].lower()
        if source.etag == MISSING:
            message = "a row of a table names it, and the store has no such object; upload it, or take the row out of the table"
            return Reject(key, "read", "missing_file", message, policy=False, uri=source.uri)
        if source.size == 0:
            return Reject(key, "read", "empty_video", "the file has no bytes", policy=False, uri=source.uri)
        if source.size > self._max_video_bytes:
            message = f"{source.size} bytes, the limit is {self._max_video_bytes}"
            return Reject(key, "read", "too_large", message, policy=True, uri=source.uri)
        by_rule = bool(self._rule) and extension in VIDEO_EXTENSIONS
        if by_rule and (fault := plain_fault(source, self._rule, self._max_video_bytes)) is not None:
            return Reject(key, "read", *fault, uri=source.uri)
        sidecars = read_sidecars(source, self._config, lambda: count(self.counters, "unreadable_texts"))
        self._received(sum(len(data) for _, data in sidecars))
        texts = [_parsed(suffix.rpartition(".")[2].lower(), data, len(data)) for suffix, data in sidecars]
        captions = [
            replace(text, name=_caption_name(suffix))
            for (suffix, _), text in zip(sidecars, texts, strict=True)
            if isinstance(text, Caption)
        ]
        metadata = next((text for text in texts if isinstance(text, Metadata)), Metadata())
        video = self._file(source)
        bare = Sample(key, index, source.uri, video, extension, span=(0, source.size), source_index=0)
        bare = replace(bare, members=tuple(self._member_file(member) for member in source.members))
        return sample_of(replace(bare, file_name=_printable(file_name)), captions, metadata)

    def _member_file(self, member: MemberObject) -> MemberVideo:
        video = self._file(SourceObject(member.uri, member.size, member.etag))
        return MemberVideo(member.name, video, _printable(member.uri.rpartition("/")[2]))

    def _file(self, source: SourceObject) -> bytes | str:
        """Path of a local file, after a check that it can be read and is the one listed; bytes or a temporary copy of a remote one."""
        with self._open(source) as stream:
            if not is_remote(source.uri):
                self._received(1)  # its bytes are read by the decoder
                return os.path.join(*locate(source.uri))
            return self._spool.hold(iter(lambda: stream.read(MiB), b""), source.size)

    def _open(self, source: SourceObject) -> ReadStream:
        stream = open_source(source, self._config)
        with self._guard:
            if self._stream is not None:
                self._waited_s += self._stream.wait_s
                self._received_bytes += self._stream.received_bytes
            self._stream = stream
        return stream

    def _received(self, num_bytes: int) -> None:
        with self._guard:
            self._received_bytes += num_bytes


def _parsed(extension: str, data: bytes, size: int) -> Caption | Metadata:
    """A parsed text member or sidecar of `size` bytes; if it is too long, `data` is only its beginning."""
    if extension == "json":
        return Metadata(warnings=("oversized_metadata",)) if size > TEXT_BYTES else parse_metadata(data)
    return Caption(None, ("oversized_caption",)) if size > TEXT_BYTES else parse_caption(data)


def _caption_name(suffix: str) -> str:
    """`txt`, `caption`, or the name in `short.txt`."""
    stem, dot, _ = suffix.rpartition(".")
    return stem if dot else suffix


def _why_no_file(member: Member) -> str | None:
    info = member.info
    if info.isdir():
        return "skipped_directory"
    if info.issym():
        return "skipped_symlink"
    return None if info.isreg() or info.islnk() else "skipped_special"


def _printable(key: str) -> str:
    r"""A name with `\xff` for bytes that are not UTF-8 (surrogates of the file system)."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

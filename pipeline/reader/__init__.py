"""A shard becomes samples, streamed in order with flat memory; nothing leaves silently.

Enters: a `Shard` (one tar, or a group of plain video files). Leaves: `Sample | Reject` in the same order on every read, and counters of
whatever was odd. A video is held in memory up to `spool_bytes`, larger ones in a temporary file until `release`; a plain local file is
never copied, its own path is handed out. Names inside archives are only ever keys, never paths.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound, SourceChanged, StorageUnavailable
from pipeline.reader.grouping import (
    Group,
    Grouper,
    caption_of,
    count,
    parse_caption,
    parse_metadata,
    split_name,
    video_rank,
    why_skipped,
)
from pipeline.reader.hashed_stream import HashedStream
from pipeline.reader.spool import Spool
from pipeline.reader.tar_stream import CutShort, Damage, Member, TarStream
from pipeline.records import Reject, Sample
from pipeline.storage import locate, open_source, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from pipeline.config import StorageConfig
    from pipeline.records import Shard, SourceObject
    from pipeline.storage import ReadStream

MiB = 1024 * 1024
TEXT_BYTES = 16 * MiB  # longest caption or metadata that is read


def read_samples(
    shard: Shard, config: StorageConfig, *, max_video_bytes: int, counters: dict[str, int] | None = None
) -> Iterator[Sample | Reject]:
    """`ShardReader` for those who are done with a sample when they ask for the next: its temporary file is gone then."""
    with ShardReader(shard, config, max_video_bytes=max_video_bytes, counters=counters) as reader:
        for item in reader:
            yield item
            if isinstance(item, Sample):
                reader.release(item)


class ShardReader:
    """Iterate once; `release` a sample when its video is no longer needed; `close` at the end, from any thread.

    `counters` fills while reading: a slug to how often (`skipped_appledouble`, `resynced_headers`, `reopened_keys`, …).

    `unread(source, error)` is called for a plain file that cannot be read although others may: refused, vanished or
    replaced since it was listed, or the store failed for all its patience. If it returns True, reading goes on with the
    next file. Else, without it, and for tars, the error is raised.

    Raises while iterating:
        StorageUnavailable: the store failed after all tries, or the temporary folder; the shard may be read again.
        SourceChanged: an object is not the one that was listed.
        NotFound: an object is gone.
        AccessError: an object is refused.
    """

    def __init__(
        self,
        shard: Shard,
        config: StorageConfig,
        *,
        max_video_bytes: int,
        counters: dict[str, int] | None = None,
        unread: Callable[[SourceObject, Exception], bool] | None = None,
    ) -> None:
        self.counters: dict[str, int] = {} if counters is None else counters
        self._shard = shard
        self._config = config
        self._max_video_bytes = max_video_bytes
        self._spool = Spool(config.spool_bytes)
        self._unread = unread
        self.digests: dict[str, str] = {}  # of a tar, once it is read: BLAKE2b-128 in hex of the object's bytes, by URI
        self._stream: ReadStream | None = None
        self._waited_s = 0.0
        self._received_bytes = 0  # by streams that are done, by ranges and side files
        self._guard = threading.Lock()  # of `_stream` and `_received_bytes`
        self._closed = False
        self._places: dict[
            str, tuple[int, int]
        ] = {}  # where in an uncompressed tar a name's contents lie, for hard links

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for storage so far."""
        return self._waited_s + (self._stream.wait_s if self._stream is not None else 0.0)

    @property
    def received_bytes(self) -> int:
        """Bytes that have arrived from storage so far, from any thread. It never shrinks."""
        with self._guard:
            return self._received_bytes + (self._stream.received_bytes if self._stream is not None else 0)

    def __iter__(self) -> Iterator[Sample | Reject]:
        items = self._read_tar() if self._shard.kind == "tar" else self._read_files()
        while True:
            try:
                item = next(items, None)
            except ValueError:
                if self._closed:  # the stream was closed under us: the consumer is gone
                    return
                raise
            if item is None or self._closed:
                return
            yield item

    def release(self, sample: Sample) -> None:
        """The video of `sample` is no longer needed. Never touches a file that was not made here."""
        if isinstance(sample.video, str):
            self._spool.drop(sample.video)

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
        grouper = Grouper(source.uri, self.counters)
        with HashedStream(self._open(source)) as stream:
            for item in TarStream(stream, self.counters):
                if isinstance(item, Damage):
                    yield from self._damage(item, grouper, source)
                else:
                    yield from self._member(item, grouper, source)
            self.digests[source.uri] = stream.finish()
        yield from grouper.drain()

    def _damage(self, damage: Damage, grouper: Grouper, source: SourceObject) -> Iterator[Sample | Reject]:
        count(self.counters, damage.reason)
        if damage.reason == "truncated_shard":
            in_member = damage.member is not None and _address(damage.member) is not None
            yield from grouper.cut_short(damage.message, in_member=in_member)
            return
        grouper.damaged()
        yield Reject(None, "read", damage.reason, damage.message, policy=False, uri=source.uri)

    def _member(self, member: Member, grouper: Grouper, source: SourceObject) -> Iterator[Sample | Reject]:
        skipped = _why_no_file(member) or why_skipped(member.name)
        address = _address(member.name)
        if skipped is None and address is None:
            skipped = "no_extension"
        if skipped is not None or address is None:
            count(self.counters, skipped or "no_extension")
            return
        key, field = address
        if member.name.startswith("/") or ".." in member.name.split("/"):
            count(self.counters, "unsafe_names")
        if not key.isascii() and key != _printable(key):
            count(self.counters, "non_utf8_names")
        yield from grouper.enter(_printable(key))
        if grouper.current is not None:
            self._take(member, field, grouper.current, source)

    def _take(self, member: Member, field: str, group: Group, source: SourceObject) -> None:
        """Adds one member to its sample, if it is of use there."""
        if field in group.fields:
            count(self.counters, "duplicate_fields")
            return
        group.fields.add(field)
        if (rank := video_rank(field)) is not None:
            self._take_video(member, field, rank, group, source)
        elif field in {"txt", "json"}:
            self._take_text(member, field, group, source)
        else:
            count(self.counters, "ignored_fields")

    def _take_video(
        self, member: Member, field: str, rank: tuple[int, int], group: Group, source: SourceObject
    ) -> None:
        if group.video_rank is not None:
            count(self.counters, "extra_videos")
            if group.video_rank <= rank:
                return
            if isinstance(group.video, str):
                self._spool.drop(group.video)
        group.video, group.video_rank, group.video_ext, group.fault = None, rank, field.rpartition(".")[2], None
        contents = self._contents(member, source)
        if contents is None:
            group.fault = (
                "unresolved_hardlink",
                f"{field} is a hard link to {member.info.linkname!r}, which is not kept",
                False,
            )
            return
        size, pieces = contents
        group.video_span = self._places.get(member.name)
        if size == 0:
            group.fault = ("empty_video", f"{field} has no bytes", False)
        elif size > self._max_video_bytes:
            group.fault = ("too_large", f"{field} has {size} bytes, the limit is {self._max_video_bytes}", True)
        else:
            try:
                group.video = self._spool.hold(pieces, size)
                group.video_bytes = size
            except CutShort as error:
                group.fault = ("truncated_shard", str(error), False)

    def _take_text(self, member: Member, field: str, group: Group, source: SourceObject) -> None:
        contents = self._contents(member, source)
        if contents is None:
            return
        size, pieces = contents
        if size > TEXT_BYTES:
            count(self.counters, "oversized_texts")
            return
        try:
            data = b"".join(pieces)
        except CutShort:
            count(self.counters, "cut_texts")
            return
        if field == "txt":
            group.caption = parse_caption(data, self.counters)
        else:
            group.metadata = parse_metadata(data, self.counters)

    def _contents(self, member: Member, source: SourceObject) -> tuple[int, Iterable[bytes]] | None:
        """Size and pieces of a member; of a hard link, its target's, read again from the object. None if that cannot be had."""
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
                raise CutShort(f"bytes {start + at} to {start + at + length} are not there")
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
        # A function of the URI alone: ids are made of keys and must not depend on which files are grouped together.
        key = _printable(os.path.splitext(source.uri.rpartition("/")[2])[0])
        extension = source.uri.rpartition(".")[2].lower()
        if source.size == 0:
            return Reject(key, "read", "empty_video", "the file has no bytes", policy=False, uri=source.uri)
        if source.size > self._max_video_bytes:
            message = f"{source.size} bytes, the limit is {self._max_video_bytes}"
            return Reject(key, "read", "too_large", message, policy=True, uri=source.uri)
        metadata = parse_metadata(data, self.counters) if (data := self._sidecar(source, "json")) else {}
        caption = parse_caption(data, self.counters) if (data := self._sidecar(source, "txt")) else None
        video = self._file(source)
        caption, span = caption or caption_of(metadata), (0, source.size)
        return Sample(key, index, source.uri, video, extension, caption, metadata, span, source_index=0)

    def _file(self, source: SourceObject) -> bytes | str:
        """A local file's own path, checked to be readable and the one listed; a remote one's bytes, or a temporary copy."""
        with self._open(source) as stream:
            if not source.uri.startswith("s3://"):
                self._received(1)  # its bytes are read by the decoder
                return os.path.join(*locate(source.uri))
            return self._spool.hold(iter(lambda: stream.read(MiB), b""), source.size)

    def _sidecar(self, source: SourceObject, extension: str) -> bytes | None:
        """`clip.txt` or `clip.json` beside `clip.mp4`; None without one."""
        root, key = locate(source.uri)
        try:
            data = open_store(root, self._config).read_range(
                f"{os.path.splitext(key)[0]}.{extension}", 0, TEXT_BYTES + 1
            )
        except NotFound:
            return None
        self._received(len(data))
        if len(data) > TEXT_BYTES:
            count(self.counters, "oversized_texts")
            return None
        return data

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


def _address(name: str) -> tuple[str, str] | None:
    return None if why_skipped(name) else split_name(name)


def _why_no_file(member: Member) -> str | None:
    info = member.info
    if info.isdir():
        return "skipped_directory"
    if info.issym():
        return "skipped_symlink"
    return None if info.isreg() or info.islnk() else "skipped_special"


def _printable(key: str) -> str:
    r"""Bytes of a name that are no UTF-8, which tarfile smuggles through as surrogates, are spelled `\xff`."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

"""Editing of boxes of mp4 files and elements of Matroska files in place, to make files that no muxer writes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}
EMPTY_EDIT = -1


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, contents) of each box in `data`."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + size]
        at += size


def box(kind: bytes, contents: bytes) -> bytes:
    """One box."""
    return struct.pack(">I4s", len(contents) + 8, kind) + contents


def rebuilt(data: bytes, change: Callable[[bytes, bytes], bytes | None]) -> bytes:
    """All boxes, with contents `change(type, contents)`, or without the box if that is None. Only for files in which `moov` comes last,
    since offsets of data are not changed.
    """
    made = b""
    for kind, contents in boxes(data):
        inner = rebuilt(contents, change) if kind in CONTAINERS else contents
        changed = change(kind, inner)
        made += b"" if changed is None else box(kind, changed)
    return made


def with_edits(mp4: bytes, edits: Sequence[tuple[int, int]], movie_scale: int = 1000) -> bytes:
    """An mp4 with one track whose edit list is `edits`: (duration in movie ticks, first media tick or `EMPTY_EDIT`)."""
    entries = b"".join(struct.pack(">Iihh", duration, start, 1, 0) for duration, start in edits)
    edts = box(b"edts", box(b"elst", struct.pack(">II", 0, len(edits)) + entries))
    total = sum(duration for duration, _ in edits)

    def change(kind: bytes, contents: bytes) -> bytes | None:
        if kind == b"edts":
            return None
        if kind == b"trak":
            head, rest = _split_after(contents, b"tkhd")
            return _with_duration(head, 8 + 20, total) + edts + rest
        if kind == b"mvhd":
            return _patched(contents, 16, struct.pack(">I", total))
        return contents

    return rebuilt(mp4, change)


def with_last_delta(mp4: bytes, delta: int) -> bytes:
    """The last sample's duration in `stts` is `delta` media ticks, and the media's duration is as long; the edit list is not."""
    total = 0

    def lengthen(kind: bytes, contents: bytes) -> bytes:
        nonlocal total
        if kind != b"stts":
            return contents
        (count,) = struct.unpack_from(">I", contents, 4)
        entries = [struct.unpack_from(">II", contents, 8 + 8 * n) for n in range(count)]
        samples, step = entries.pop()
        entries += [(samples - 1, step)] if samples > 1 else []
        entries.append((1, delta))
        total = sum(samples * step for samples, step in entries)
        return struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">II", *entry) for entry in entries)

    lengthened = rebuilt(mp4, lengthen)
    return rebuilt(lengthened, lambda k, c: _patched(c, 16, struct.pack(">I", total)) if k == b"mdhd" else c)


def with_empty_sample(mp4: bytes, number: int) -> bytes:
    """Sample `number` has size 0; its bytes are those of the sample before."""

    def change(kind: bytes, contents: bytes) -> bytes:
        if kind != b"stsz":
            return contents
        at = 12 + 4 * (number - 1)
        return _patched(contents, at, struct.pack(">II", sum(struct.unpack_from(">II", contents, at)), 0))

    return rebuilt(mp4, change)


def with_clap(mp4: bytes, width: int, height: int, left_of_centre: float = 0, above_centre: float = 0) -> bytes:
    """A clean aperture of `width` x `height` whose centre is that far from the picture's."""
    clap = struct.pack(">IIIIiIiI", width, 1, height, 1, round(-left_of_centre * 2), 2, round(-above_centre * 2), 2)
    return _described(mp4, box(b"clap", clap))


def with_dolby_vision(mp4: bytes, profile: int, compatibility: int) -> bytes:
    """A Dolby Vision configuration record (version 1.0, level 6, RPU and base layer)."""
    record = struct.pack(">BBHB19x", 1, 0, profile << 9 | 6 << 3 | 0b101, compatibility << 4)
    return _described(mp4, box(b"dvcC" if profile <= 7 else b"dvvC", record))


def with_two_codecs(mp4: bytes, first: int) -> bytes:
    """An mp4 of one chunk, in two: the samples behind the first `first` have a sample entry of their own, of another codec."""
    at = mp4.index(b"stsz") + 12
    sizes = struct.unpack_from(f">{struct.unpack_from('>I', mp4, at)[0]}I", mp4, at + 4)

    def change(kind: bytes, contents: bytes) -> bytes:
        if kind == b"stsd":
            entry = contents[8:]
            return struct.pack(">II", 0, 2) + entry + entry[:4] + b"hvc1" + entry[8:]
        if kind == b"stsc":
            return struct.pack(">8I", 0, 2, 1, first, 1, 2, len(sizes) - first, 2)
        if kind == b"stco":
            (offset,) = struct.unpack_from(">I", contents, 8)
            return struct.pack(">4I", 0, 2, offset, offset + sum(sizes[:first]))
        return contents

    return rebuilt(mp4, change)


def _described(mp4: bytes, extra: bytes) -> bytes:
    """The box `extra` at the end of the sample entry."""

    def change(kind: bytes, contents: bytes) -> bytes:
        if kind != b"stsd":
            return contents
        entry = contents[8:]
        (size,) = struct.unpack_from(">I", entry)
        return contents[:8] + box(entry[4:8], entry[8:size] + extra) + entry[size:]

    return rebuilt(mp4, change)


def _split_after(data: bytes, kind: bytes) -> tuple[bytes, bytes]:
    at = 0
    for found, contents in boxes(data):
        at += 8 + len(contents)
        if found == kind:
            return data[:at], data[at:]
    raise ValueError(f"no {kind!r} box")


def _with_duration(data: bytes, offset: int, duration: int) -> bytes:
    return _patched(data, offset, struct.pack(">I", duration))


def _patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


# --- Matroska ---------------------------------------------------------------------------------------------------------

CLUSTER, TIMESTAMP = b"\x1f\x43\xb6\x75", 0xE7
SIMPLE_BLOCK, BLOCK_GROUP = 0xA3, 0xA0


def _element_size(data: bytes, at: int) -> tuple[int, int]:
    """Value and length of the variable-length size at `at`."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return value, length


def cluster_times(mkv: bytes) -> list[int]:
    """Time of each cluster in milliseconds."""
    return [int.from_bytes(mkv[at : at + size], "big") for at, size in _cluster_times(mkv)]


def with_cluster_times(mkv: bytes, change: Callable[[int, int], int]) -> bytes:
    """Changes each cluster's time to `change(position, time)`, in milliseconds, which must fit into the same bytes."""
    made = bytearray(mkv)
    for position, (at, size) in enumerate(_cluster_times(mkv)):
        time = int.from_bytes(mkv[at : at + size], "big")
        made[at : at + size] = change(position, time).to_bytes(size, "big")
    return bytes(made)


def _cluster_times(mkv: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while (at := mkv.find(CLUSTER, at)) >= 0:
        inner = at + 4
        inner += _element_size(mkv, inner)[1]
        if mkv[inner] == TIMESTAMP:
            size, length = _element_size(mkv, inner + 1)
            yield inner + 1 + length, size
        at = inner


def without_block_times(mkv: bytes, positions: Sequence[int]) -> bytes:
    """The blocks at these positions lie before time zero, which libav passes on as "no time". For files of one track."""
    made = bytearray(mkv)
    position = 0
    for time_at, time_size in _cluster_times(mkv):
        time = int.from_bytes(mkv[time_at : time_at + time_size], "big")
        at = time_at + time_size
        while at < len(mkv) and mkv[at] in (SIMPLE_BLOCK, BLOCK_GROUP):
            size, length = _element_size(mkv, at + 1)
            block = at + 1 + length
            if mkv[at] == BLOCK_GROUP:  # of a block with a duration or a reference: the Block comes first in it
                block += 1 + _element_size(mkv, block + 1)[1]
            if position in positions:
                made[block + 1 : block + 3] = struct.pack(">h", -time - 1)
            position += 1
            at += 1 + length + size
    return bytes(made)


def with_pixel_crop(mkv: bytes, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> bytes:
    """Adds PixelCrop, in pixels of each side. The Void element before the header shrinks by as much as the header grows."""
    crops = {0x54CC: left, 0x54BB: top, 0x54DD: right, 0x54AA: bottom}
    extra = b"".join(struct.pack(">HBH", kind, 0x82, value) for kind, value in crops.items() if value)
    segment = _child(mkv, 0, 0x18538067)
    void = _child(mkv, segment.start, 0xEC)
    tracks = _child(mkv, segment.start, 0x1654AE6B)
    entry = _child(mkv, tracks.start, 0xAE)
    video = _child(mkv, entry.start, 0xE0)
    made = bytearray(mkv)
    made[video.start + video.size : video.start + video.size] = extra
    for element in (video, entry, tracks):
        _set_size(made, element, element.size + len(extra))
    _set_size(made, void, void.size - len(extra))
    del made[void.start : void.start + len(extra)]
    _move_seek_entries(made, segment.start, void.start - segment.start, tracks.start - segment.start, -len(extra))
    return bytes(made)


class Element(NamedTuple):
    """An element of Matroska: position and length of its size, position and length of its contents."""

    size_at: int
    length: int
    start: int
    size: int


def _child(data: bytes, at: int, identifier: int) -> Element:
    """The first element with `identifier` among the siblings from `at` on."""
    while at < len(data):
        width = 9 - data[at].bit_length()
        size, length = _element_size(data, at + width)
        if int.from_bytes(data[at : at + width], "big") == identifier:
            return Element(at + width, length, at + width + length, size)
        at += width + length + size
    raise ValueError(f"no element {identifier:#x}")


def _set_size(data: bytearray, element: Element, size: int) -> None:
    if size >= (1 << 7 * element.length) - 1:
        raise ValueError(f"a size of {size} does not fit {element.length} bytes")
    data[element.size_at : element.size_at + element.length] = (size | 1 << 7 * element.length).to_bytes(
        element.length, "big"
    )


def _move_seek_entries(data: bytearray, segment: int, after: int, before: int, change: int) -> None:
    """Changes positions in the seek head between `after` and `before` (from the segment's start)."""
    head = _child(bytes(data), segment, 0x114D9B74)
    at = head.start
    while (at := data.find(b"\x53\xac", at, head.start + head.size)) >= 0:
        size = data[at + 2] & 0x7F
        position = int.from_bytes(data[at + 3 : at + 3 + size], "big")
        if after < position <= before:
            data[at + 3 : at + 3 + size] = (position + change).to_bytes(size, "big")
        at += 3

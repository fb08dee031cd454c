"""Boxes of mp4 files and elements of Matroska files, found and rewritten in place: what no muxer writes by itself."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

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
    """All boxes again; `change(type, contents)` gives new contents, None to drop the box. Of use while `moov` comes last, since offsets of
    samples stay.
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
    """The last sample's duration in `stts` says `delta` media ticks; nothing else knows of it."""

    def change(kind: bytes, contents: bytes) -> bytes:
        if kind != b"stts":
            return contents
        (count,) = struct.unpack_from(">I", contents, 4)
        entries = [struct.unpack_from(">II", contents, 8 + 8 * n) for n in range(count)]
        samples, step = entries.pop()
        entries += [(samples - 1, step)] if samples > 1 else []
        entries.append((1, delta))
        return struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">II", *entry) for entry in entries)

    return rebuilt(mp4, change)


def with_clap(mp4: bytes, width: int, height: int, left_of_centre: float = 0, above_centre: float = 0) -> bytes:
    """A clean aperture of `width` x `height` whose centre is that far from the picture's."""
    clap = struct.pack(">IIIIiIiI", width, 1, height, 1, round(-left_of_centre * 2), 2, round(-above_centre * 2), 2)

    def change(kind: bytes, contents: bytes) -> bytes:
        if kind != b"stsd":
            return contents
        entry = contents[8:]
        (size,) = struct.unpack_from(">I", entry)
        return contents[:8] + box(entry[4:8], entry[8:size] + box(b"clap", clap)) + entry[size:]

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
    """Each cluster's time becomes `change(position, time)`, in milliseconds; it must fit the bytes that are there."""
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
    """The track says that so many pixels of each side are not shown. The bytes come from the Void element that libav leaves at the head."""
    crops = {0x54CC: left, 0x54BB: top, 0x54DD: right, 0x54AA: bottom}
    extra = b"".join(struct.pack(">HBH", kind, 0x82, value) for kind, value in crops.items() if value)
    return _inserted(mkv, extra)


def _inserted(mkv: bytes, extra: bytes) -> bytes:
    """`extra` at the end of the first Video element. Sizes of its parents grow and the segment's is unknown afterwards, so offsets of the
    index are wrong by as much: it is voided.
    """
    parents = _path(mkv, 0, [b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"])
    made = bytearray(mkv)
    end = parents[-1][0] + parents[-1][2] + parents[-1][1]
    made[end:end] = extra
    for at, size, length in parents:
        new = size + len(extra)
        if new >= (1 << 7 * length) - 1:
            raise ValueError("the element's size does not fit its bytes")
        made[at : at + length] = (new | 1 << 7 * length).to_bytes(length, "big")
    seek_head = bytes(made).find(b"\x11\x4d\x9b\x74")
    if 0 <= seek_head < 200:  # positions in it are those of before: as a Void element nobody reads them
        size, length = _element_size(made, seek_head + 4)
        whole = 4 + length + size
        made[seek_head : seek_head + whole] = b"\xec" + (whole - 9 | 1 << 56).to_bytes(8, "big") + bytes(whole - 9)
    return bytes(made)


def _path(data: bytes, start: int, path: list[bytes]) -> list[tuple[int, int, int]]:
    """(offset of the size, size, its length) of each element along `path`."""
    found = []
    at = start
    for identifier in path:
        at = data.index(identifier, at) + len(identifier)
        size, length = _element_size(data, at)
        found.append((at, size, length))
        at += length
    return found

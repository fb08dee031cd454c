"""Matroska files whose PixelCrop leaves nothing of the frame, with that cropping hidden from libav. Part of the decode package.

libav 8.1 refuses such a file as a whole; players ignore the values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.video.decode.encoded_file import EncodedFile

HEADER_BYTES = 1 << 20  # tracks that lie further back are not looked at
SEGMENT, CLUSTER, TRACKS, TRACK, VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 0xB0, 0xBA, 0x54CC, 0x54DD, 0x54BB, 0x54AA
MAGIC, VOID = b"\x1a\x45\xdf\xa3", b"\xec"


def hide_impossible_crops(file: EncodedFile) -> PatchedFile | None:
    """A view of a Matroska file without the cropping that leaves nothing, from its beginning; None where there is no such cropping."""
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        return None
    patches = impossible_crops(MAGIC + file.read(HEADER_BYTES))
    file.seek(0)
    return PatchedFile(file, patches) if patches else None


def impossible_crops(header: bytes) -> list[tuple[int, bytes]]:
    """(position, bytes) that make the PixelCrop elements void of each track whose margins leave nothing. `header` is a file's beginning."""
    videos = _within(header, 0, len(header), SEGMENT, TRACKS, TRACK, VIDEO)
    return [patch for begin, end in videos for patch in _voided(header, begin, end)]


def _within(data: bytes, begin: int, end: int, *path: int) -> Iterator[tuple[int, int]]:
    """Where the contents of elements at `path` lie."""
    for number, _, content, after in _elements(data, begin, end):
        if number == CLUSTER:
            return
        if number != path[0]:
            continue
        if len(path) == 1:
            yield content, after
        else:
            yield from _within(data, content, after, *path[1:])


def _voided(data: bytes, begin: int, end: int) -> list[tuple[int, bytes]]:
    values: dict[int, int] = {}
    margins = []
    for number, start, content, after in _elements(data, begin, end):
        values[number] = int.from_bytes(data[content:after][:8], "big")
        if number in (LEFT, RIGHT, TOP, BOTTOM) and after - start < 0x80:
            margins.append((start, VOID + bytes([0x80 | (after - start - 2)]) + bytes(after - start - 2)))

    def leaves(size: int, *sides: int) -> bool:
        return sum(values.get(side, 0) for side in sides) < values.get(size, 0)

    return [] if leaves(WIDTH, LEFT, RIGHT) and leaves(HEIGHT, TOP, BOTTOM) else margins


def _elements(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, start, start of the content, end) of the EBML elements in a range; stops where they make no sense."""
    while begin < end:
        head = data[begin : begin + 12]
        id_length = 9 - head[0].bit_length()
        size_length = 9 - head[id_length].bit_length() if len(head) > id_length else 9
        content = begin + id_length + size_length
        if id_length > 4 or size_length > 8 or content > end:
            return
        size = int.from_bytes(data[begin + id_length : content], "big") & ~(1 << 7 * size_length)
        # All ones: as long as what it lies in.
        after = end if size == (1 << 7 * size_length) - 1 else min(content + size, end)
        yield int.from_bytes(data[begin : begin + id_length], "big"), begin, content, after
        begin = after


class PatchedFile:
    """An encoded file that reads as if a few bytes of its beginning were others."""

    def __init__(self, file: EncodedFile, patches: list[tuple[int, bytes]]) -> None:
        """`patches` are (position, bytes)."""
        self._file, self._patches = file, patches

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`."""
        at = self._file.tell()
        data = self._file.read(size)
        for position, patch in self._patches:
            if at < position + len(patch) and position < at + len(data):
                inside = bytearray(data)
                begin, end = max(position, at), min(position + len(patch), at + len(data))
                inside[begin - at : end - at] = patch[begin - position : end - position]
                data = bytes(inside)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; see the file below."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file below; safe to call twice."""
        self._file.close()

    def check(self) -> None:
        """Raises what a failed read below means; see the file below."""
        self._file.check()

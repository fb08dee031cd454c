"""Matroska files whose PixelCrop leaves nothing of the frame, with that cropping hidden from libav. Part of the decode package.

libav 8.1 refuses such a file as a whole; players ignore the values.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from pipeline.video.decode.ebml import MAGIC, SEGMENT, TRACK, TRACKS, Element, elements, find, unsigned

if TYPE_CHECKING:
    from pipeline.video.decode.encoded_file import EncodedFile

HEADER_BYTES = 1 << 20  # tracks behind them are not searched
VIDEO, WIDTH, HEIGHT = 0xE0, 0xB0, 0xBA
LEFT, RIGHT, TOP, BOTTOM = 0x54CC, 0x54DD, 0x54BB, 0x54AA
VOID = b"\xec"


def hide_impossible_crops(file: EncodedFile) -> PatchedFile | None:
    """The file, rewound, without PixelCrop elements that leave nothing of the frame; None if it has none or is not Matroska."""
    file.seek(0)
    is_matroska = file.read(len(MAGIC)) == MAGIC
    patches = impossible_crops(file) if is_matroska else []
    file.seek(0)
    return PatchedFile(file, patches) if patches else None


def impossible_crops(file: EncodedFile) -> list[tuple[int, bytes]]:
    """(position, bytes) that turn the PixelCrop elements of each track into void ones, if they leave nothing of the frame."""
    size = min(file.seek(0, os.SEEK_END), HEADER_BYTES)
    videos = find(file, 0, size, SEGMENT, TRACKS, TRACK, VIDEO)
    return [patch for video in videos for patch in _voided(file, video)]


def _voided(file: EncodedFile, video: Element) -> list[tuple[int, bytes]]:
    values: dict[int, int] = {}
    patches = []
    for element in elements(file, video.content, video.end):
        values[element.identifier] = unsigned(file, element)
        num_bytes = element.end - element.start
        if element.identifier in (LEFT, RIGHT, TOP, BOTTOM) and num_bytes < 0x80:
            patches.append((element.start, VOID + bytes([0x80 | (num_bytes - 2)]) + bytes(num_bytes - 2)))

    def leaves(size: int, *sides: int) -> bool:
        return sum(values.get(side, 0) for side in sides) < values.get(size, 0)

    return [] if leaves(WIDTH, LEFT, RIGHT) and leaves(HEIGHT, TOP, BOTTOM) else patches


class PatchedFile:
    """An encoded file with some bytes replaced as it is read."""

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
        """Moves, as the file below does."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file below; safe to call twice."""
        self._file.close()

    def check(self) -> None:
        """Raises the error of a failed read, as the file below does."""
        self._file.check()

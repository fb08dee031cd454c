"""Elements of Matroska and WebM files (EBML), read without libav. Part of the decode package."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.video.decode.encoded_file import EncodedFile

MAGIC = b"\x1a\x45\xdf\xa3"
SEGMENT, CLUSTER, TRACKS, TRACK = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE
MOST_ELEMENTS = 20_000  # read on one level: a hostile file may hold millions


class Element(NamedTuple):
    """Position of an element in its file: first byte, first byte of its contents, first byte behind it."""

    identifier: int
    start: int
    content: int
    end: int


def elements(file: EncodedFile, begin: int, end: int) -> Iterator[Element]:
    """The elements in bytes `[begin, end)`, of one level. Stops at bytes that are not an element and at a live stream's clusters."""
    for _ in range(MOST_ELEMENTS):
        if begin >= end:
            return
        file.seek(begin)
        head = file.read(12)
        id_bytes = 9 - head[0].bit_length() if head else 9
        size_bytes = 9 - head[id_bytes].bit_length() if len(head) > id_bytes else 9
        content = begin + id_bytes + size_bytes
        if id_bytes > 4 or size_bytes > 8 or content > end:
            return
        identifier = int.from_bytes(head[:id_bytes], "big")
        size = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") & ~(1 << 7 * size_bytes)
        unknown = size == (1 << 7 * size_bytes) - 1  # all ones: it ends with the element that holds it
        if identifier == CLUSTER and unknown:
            return
        after = end if unknown else min(content + size, end)
        yield Element(identifier, begin, content, after)
        begin = after


def find(file: EncodedFile, begin: int, end: int, *path: int) -> Iterator[Element]:
    """The elements at `path`, a list of identifiers from the outermost to the innermost."""
    for element in elements(file, begin, end):
        if element.identifier == path[0]:
            if len(path) == 1:
                yield element
            else:
                yield from find(file, element.content, element.end, *path[1:])


def unsigned(file: EncodedFile, element: Element) -> int:
    """The number that an element holds."""
    file.seek(element.content)
    return int.from_bytes(file.read(min(element.end - element.content, 8)), "big")

"""Writers of cropping into containers, which PyAV lacks: Matroska's PixelCrop, MP4's `clap`."""

from __future__ import annotations

import struct
from fractions import Fraction

VIDEO = {
    "width": b"\xb0",
    "height": b"\xba",
    "left": b"\x54\xcc",
    "right": b"\x54\xdd",
    "top": b"\x54\xbb",
    "bottom": b"\x54\xaa",
    "display_width": b"\x54\xb0",
    "display_height": b"\x54\xba",
    "display_unit": b"\x54\xb2",
}
VOID = 0xEC


def with_pixel_crop(mkv: bytes, **values: int) -> bytes:
    """A Matroska file of libav whose first track has the given `VIDEO` values."""
    elements = b"".join(VIDEO[name] + b"\x82" + value.to_bytes(2, "big") for name, value in values.items())
    data = bytearray(mkv)
    begin, end = _element(data, 0, len(data), 0x18538067)  # Segment
    parents = []
    for number in (0x1654AE6B, 0xAE, 0xE0):  # Tracks, TrackEntry, Video
        begin, end = _element(data, begin, end, number)
        parents.append(begin)
    data[end:end] = elements
    grown = len(elements)
    for begin in reversed(parents):
        grown += _grow(data, begin, grown)
    # The space that libav reserves before gives way, so that clusters and cues stay where they are.
    begin, end = _element(data, *_element(data, 0, len(data), 0x18538067), VOID)
    del data[end - grown : end]
    _grow(data, begin, -grown)
    assert len(data) == len(mkv)
    return bytes(data)


def _number(data: bytes | bytearray, position: int) -> int:
    """Length in bytes of the EBML number at `position`."""
    return 9 - data[position].bit_length()


def _element(data: bytes | bytearray, begin: int, end: int, number: int) -> tuple[int, int]:
    """Position of the content of the first element `number` between `begin` and `end`."""
    while begin < end:
        after = begin + _number(data, begin)
        found = int.from_bytes(data[begin:after], "big")
        content = after + _number(data, after)
        size = int.from_bytes(data[after:content], "big") & ~(1 << 7 * (content - after))
        if found == number:
            return content, content + size
        begin = content + size
    raise AssertionError(f"no element {number:x}")


def _grow(data: bytearray, content: int, by: int) -> int:
    """Changes the size in front of `content`, which may become longer; returns by how much."""
    length = next(n for n in range(1, 9) if _number(data, content - n) == n)
    size = (int.from_bytes(data[content - length : content], "big") & ~(1 << 7 * length)) + by
    needed = max(length, 1 if size < 127 else 2)
    data[content - length : content] = (size | 1 << 7 * needed).to_bytes(needed, "big")
    return needed - length


def with_clap(
    mp4: bytes, width: Fraction | int, height: Fraction | int, x: Fraction | int = 0, y: Fraction | int = 0
) -> bytes:
    """An MP4 file with its header at the end whose first track has a clean aperture of this size around the centre plus (x, y)."""
    numbers = [Fraction(value) for value in (width, height, x, y)]
    box = struct.pack(
        ">I4s8i", 40, b"clap", *(part for value in numbers for part in (value.numerator, value.denominator))
    )
    return with_box(mp4, box)


def with_box(mp4: bytes, box: bytes) -> bytes:
    """`box` as the last of the first track's sample entry."""
    data, position, parents = bytearray(mp4), 0, []
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        while data[position + 4 : position + 8] != name:
            position += int.from_bytes(data[position : position + 4], "big")
        parents.append(position)
        position += 16 if name == b"stsd" else 8
    parents.append(position)
    end = position + int.from_bytes(data[position : position + 4], "big")
    data[end:end] = box
    for parent in parents:
        size = int.from_bytes(data[parent : parent + 4], "big") + len(box)
        data[parent : parent + 4] = size.to_bytes(4, "big")
    return bytes(data)

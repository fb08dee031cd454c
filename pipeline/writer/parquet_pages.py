"""Streaming of one long tensor into a Parquet file as its own page.

Arrow assembles a page in memory, in two copies: gigabytes for an hour of video. Therefore the row group is written with an empty
placeholder for the tensor, the page is written after it, and the footer of the finished file (Thrift, compact protocol) is changed to point
at the page. The placeholder's few bytes stay unreferenced. Readers see ordinary Parquet.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.format.tensors import pieces

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.format.tensors import Payload

MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_INTEGERS = (_I16, _I32, _I64)

# Field numbers of parquet.thrift.
_ROW_GROUPS, _COLUMNS, _ROW_GROUP_BYTES, _ROW_GROUP_COMPRESSED = 4, 1, 2, 6
_CHUNK_META, _CHUNK_OFFSET_INDEX, _CHUNK_OFFSET_INDEX_LENGTH = 3, 4, 5
_META_UNCOMPRESSED, _META_COMPRESSED, _META_DATA_PAGE, _META_SIZES = 6, 7, 9, 16
_SIZES_BYTES = 1


@dataclass(frozen=True, slots=True)
class StreamedPage:
    """Page written by `write_page`: column chunk that it replaces, offset, bytes with header, and bytes of the tensor."""

    row_group: int
    column: int
    offset: int
    num_bytes: int
    payload_bytes: int


def write_page(
    write: Callable[[bytes | memoryview], Any], tensor: Payload, *, at: int, row_group: int, column: int
) -> StreamedPage:
    """Writes a data page (v1) holding one PLAIN, uncompressed, required binary value through `write`, in pieces."""
    length = tensor.num_bytes.to_bytes(4, "little")
    checksum = zlib.crc32(length)
    for piece in pieces(tensor.data):
        checksum = zlib.crc32(piece, checksum)
    size = 4 + tensor.num_bytes
    signed = checksum - (1 << 32) if checksum >= 1 << 31 else checksum
    plain, rle = 0, 3
    values = {1: (_I32, 1), 2: (_I32, plain), 3: (_I32, rle), 4: (_I32, rle)}
    header = encode_struct({1: (_I32, 0), 2: (_I32, size), 3: (_I32, size), 4: (_I32, signed), 5: (_STRUCT, values)})
    write(header + length)
    for piece in pieces(tensor.data):
        write(piece)
    return StreamedPage(row_group, column, at, len(header) + size, tensor.num_bytes)


def point_footer_at(path: Path, pages: list[StreamedPage]) -> None:
    """Replaces the footer of a finished file by one whose column chunks are `pages` instead of placeholders.

    Raises:
        ValueError: the file's footer has another layout than expected.
    """
    with path.open("r+b") as file:
        file.seek(-8, 2)
        length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
        footer_at = file.seek(-8 - length, 2)
        footer = decode_struct(file.read(length))
        if magic != MAGIC or _ROW_GROUPS not in footer:
            raise ValueError(f"{path.name} has no plain Parquet footer")
        file.seek(footer_at)
        file.truncate()
        for page in pages:
            _replace_chunk(footer, page, file.tell(), file.write)
        encoded = encode_struct(footer)
        file.write(encoded + len(encoded).to_bytes(4, "little") + MAGIC)


def _replace_chunk(footer: dict[int, Any], page: StreamedPage, index_at: int, write: Callable[[bytes], Any]) -> None:
    group = footer[_ROW_GROUPS][1][1][page.row_group]
    chunk = group[_COLUMNS][1][1][page.column]
    meta = chunk[_CHUNK_META][1]
    grown = page.num_bytes - meta[_META_COMPRESSED][1]
    if meta[_META_COMPRESSED][1] != meta[_META_UNCOMPRESSED][1] or group[3][1] != 1:
        raise ValueError("a streamed page can only replace the one uncompressed value of a row group of one row")
    meta[_META_UNCOMPRESSED] = meta[_META_COMPRESSED] = (_I64, page.num_bytes)
    meta[_META_DATA_PAGE] = (_I64, page.offset)
    if _META_SIZES in meta:
        meta[_META_SIZES][1][_SIZES_BYTES] = (_I64, page.payload_bytes)
    for total in (_ROW_GROUP_BYTES, _ROW_GROUP_COMPRESSED):
        if total in group:
            group[total] = (_I64, group[total][1] + grown)
    location = {1: (_I64, page.offset), 2: (_I32, page.num_bytes), 3: (_I64, 0)}
    index = encode_struct({1: (_LIST, (_STRUCT, [location])), 2: (_LIST, (_I64, [page.payload_bytes]))})
    write(index)
    chunk[_CHUNK_OFFSET_INDEX] = (_I64, index_at)
    chunk[_CHUNK_OFFSET_INDEX_LENGTH] = (_I32, len(index))


# Thrift compact protocol: structs as {field number: (type, value)}, lists as (element type, values).


def encode_struct(fields: dict[int, tuple[int, Any]]) -> bytes:
    """A struct in the compact protocol."""
    out, last = bytearray(), 0
    for number in sorted(fields):
        kind, value = fields[number]
        if 0 < number - last <= 15:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            out += _varint(_zigzag(number))
        last = number
        if kind not in (_TRUE, _FALSE):  # the type of a boolean field is its value
            out += _encode(kind, value)
    return bytes(out) + b"\0"


def decode_struct(data: bytes) -> dict[int, tuple[int, Any]]:
    """Inverse of `encode_struct`.

    Raises:
        ValueError: a type that Parquet footers do not use.
    """
    return _Decoder(data).struct()


def _encode(kind: int, value: Any) -> bytes:
    if kind in _INTEGERS:
        return _varint(_zigzag(value))
    if kind == _BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == _STRUCT:
        return encode_struct(value)
    if kind == _LIST:
        element, values = value
        size = (
            bytes([len(values) << 4 | element]) if len(values) < 15 else bytes([0xF0 | element]) + _varint(len(values))
        )
        return size + b"".join(_encode(element, item) for item in values)
    return bytes(value)  # a byte, a double, a boolean in a list: kept as they were read


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, tuple[int, Any]]:
        fields, number = {}, 0
        while head := self._take(1)[0]:
            kind, step = head & 0x0F, head >> 4
            number = number + step if step else self._integer()
            fields[number] = (kind, None if kind in (_TRUE, _FALSE) else self._value(kind))
        return fields

    def _value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind == _LIST:
            head = self._take(1)[0]
            size = self._varint() if head >> 4 == 15 else head >> 4
            return head & 0x0F, [self._value(head & 0x0F) for _ in range(size)]
        if kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
            return self._take(8 if kind == _DOUBLE else 1)
        raise ValueError(f"a Parquet footer with Thrift type {kind}")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 if not value & 1 else -(value >> 1) - 1

    def _varint(self) -> int:
        value, shift = 0, 0
        while (byte := self._take(1)[0]) > 0x7F:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise ValueError("a Parquet footer that ends too early")
        self._at += size
        return piece

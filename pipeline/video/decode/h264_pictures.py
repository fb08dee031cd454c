"""Parser of the pictures in the packets of an H.264 stream, without decoding. Part of the decode package.

Takes packets in decode order (with start codes or length prefixes). Finds packets that show no frame of their own (the second field of a
picture whose first field was in a packet before, and packets without a picture) and packets before which a reference picture is missing.
Reads sequence parameter sets up to `frame_mbs_only_flag` and slice headers up to `bottom_field_flag` (ITU-T H.264 7.3.2.1, 7.3.2.2, 7.3.3,
7.4.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

IDR = 5
SLICES = (1, IDR)  # NAL unit types: a slice, of an IDR picture or another
SLICE_BYTES = 48  # read of a slice
NO_PICTURE = (6, 7, 8, 9, 10, 11, 12, 13, 15)  # messages, parameters, delimiters, ends, filler
SPS, PPS = 7, 8
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # with chroma format and scaling lists


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[start, end)` of a NAL unit in a packet, header byte included. A wrong length may put `end` behind the packet."""

    start: int
    end: int


def nal_length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each NAL unit; 0 if there are start codes instead."""
    at, shortest = (21, 22) if codec == "hevc" else (4, 6)
    configured = len(extradata) > shortest and extradata[0] == 1
    return (extradata[at] & 3) + 1 if configured else 0


def nal_units(data: bytes, length_size: int) -> Iterator[Span]:
    """NAL units of a packet, without empty ones."""
    position = 0
    while length_size and position + length_size < len(data):
        start = position + length_size
        position = start + int.from_bytes(data[position:start], "big")
        if start < position:
            yield Span(start, position)
    while not length_size and 0 <= (position := data.find(b"\0\0\1", position)) < len(data) - 3:
        following = data.find(b"\0\0\1", position + 3)
        end = len(data) if following < 0 else following
        if position + 3 < end:
            yield Span(position + 3, end)
        position += 3


def nal_contents(data: bytes) -> Iterator[bytes]:
    """NAL units that follow start codes."""
    return (data[span.start : span.end] for span in nal_units(data, 0))


def unescape(data: bytes) -> bytes:
    """Payload of a NAL unit without its emulation prevention bytes."""
    return data.replace(b"\0\0\3", b"\0\0")


class Pictures:
    """State of the parser: parameter sets, the last reference picture and the last unpaired first field. Takes each packet in order."""

    LOOK_BYTES = 16 * 1024  # read of a packet: its parameter sets, messages and first slice header

    def __init__(self, extradata: bytes) -> None:
        """`extradata` has the parameter sets that the container holds, if it holds them."""
        self.is_second_field = False  # of the last packet
        self.follows_gap = False  # of the last packet: reference pictures before it are missing
        self._length_size = nal_length_size("h264", extradata)
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}  # picture parameter set -> sequence parameter set
        self._field: _Slice | None = None  # a first field whose second has not come
        self._reference: int | None = None  # frame number of the last reference picture
        units = _configured(extradata) if self._length_size else nal_contents(extradata)
        for unit in units:
            self._remember(unit)

    def shows_none(self, packet: Any) -> bool:
        """Whether the packet shows no frame: it completes the picture of the packet before, or holds no picture."""
        self.is_second_field = self.follows_gap = False
        size = packet.size
        data = bytes(memoryview(packet)[: self.LOOK_BYTES]) if size > self.LOOK_BYTES else bytes(packet)
        end = 0
        for span in nal_units(data, self._length_size):
            kind, end = data[span.start] & 0x1F, span.end
            if kind in (SPS, PPS) and end <= len(data):
                self._remember(data[span.start : end])
            elif kind in SLICES:
                return self._look(data[span.start : span.start + SLICE_BYTES])
            elif kind not in NO_PICTURE:
                return False
        return end == size  # a damaged packet may have held a picture

    def _look(self, unit: bytes) -> bool:
        waiting, self._field = self._field, None
        found = self._slice(unit)
        if found is None:
            self._reference = None
            return False
        if found.is_field and waiting is not None and waiting.number == found.number and waiting.bottom != found.bottom:
            self.is_second_field = True
        elif found.is_field:
            self._field = found
        if unit[0] & 0x1F == IDR:
            self._reference = 0
        elif self._reference is not None and not found.gaps_allowed:
            self.follows_gap = found.number not in (self._reference, (self._reference + 1) % found.numbers)
        if unit[0] >> 5 & 3:  # nal_ref_idc: a reference picture
            self._reference = found.number
        return self.is_second_field

    def _remember(self, unit: bytes) -> None:
        try:
            bits = _Bits(unescape(unit[1:]))
            if unit[0] & 0x1F == SPS:
                number, sequence = _read_sequence(bits)
                self._sequences[number] = sequence
            elif unit[0] & 0x1F == PPS:
                number = bits.unsigned()
                self._sequence_of[number] = bits.unsigned()
        except IndexError:  # cut short: the decoder will report it
            return

    def _slice(self, unit: bytes) -> _Slice | None:
        """The beginning of a slice header; None if it cannot be read."""
        try:
            bits = _Bits(unescape(unit[1:]))
            bits.unsigned()  # first_mb_in_slice
            bits.unsigned()  # slice_type
            sequence = self._sequences.get(self._sequence_of.get(bits.unsigned(), -1))
            if sequence is None:
                return None
            if sequence.separate_planes:
                bits.take(2)
            number = bits.take(sequence.frame_number_bits)
            is_field = not sequence.frames_only and bool(bits.take(1))
            bottom = is_field and bool(bits.take(1))
            return _Slice(number, is_field, bottom, 1 << sequence.frame_number_bits, sequence.gaps_allowed)
        except IndexError:
            return None


class _Slice(NamedTuple):
    """Fields of a slice header that tell pictures apart."""

    number: int  # frame_num
    is_field: bool
    bottom: bool
    numbers: int  # frame_num is counted modulo this
    gaps_allowed: bool


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Fields of a sequence parameter set that are needed to read a slice header."""

    frames_only: bool
    separate_planes: bool
    frame_number_bits: int
    gaps_allowed: bool


class _Bits:
    """Reader of bits and of numbers in Exp-Golomb code. Raises IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        self._left = 8 * len(data)
        self._value = int.from_bytes(data, "big")

    def take(self, count: int) -> int:
        if count > self._left:
            raise IndexError("behind the end")
        self._left -= count
        taken = self._value >> self._left
        self._value ^= taken << self._left
        return taken

    def unsigned(self) -> int:
        zeros = self._left - self._value.bit_length()
        if zeros > 32:
            raise IndexError("no number in Exp-Golomb code")
        return self.take(2 * zeros + 1) - 1

    def signed(self) -> int:
        value = self.unsigned()
        return (value + 1) // 2 if value & 1 else -(value // 2)


def _read_sequence(bits: _Bits) -> tuple[int, _Sequence]:
    profile = bits.take(8)
    bits.take(16)  # constraint flags, level
    number, separate_planes = bits.unsigned(), False
    if profile in HIGH_PROFILES:
        chroma_format = bits.unsigned()
        separate_planes = chroma_format == 3 and bool(bits.take(1))
        bits.unsigned()  # luma depth
        bits.unsigned()  # chroma depth
        bits.take(1)
        if bits.take(1):
            for which in range(8 if chroma_format != 3 else 12):
                _skip_scaling_list(bits, 16 if which < 6 else 64)
    frame_number_bits = bits.unsigned() + 4
    order_type = bits.unsigned()
    if order_type == 0:
        bits.unsigned()
    elif order_type == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        for _ in range(min(bits.unsigned(), 255)):
            bits.signed()
    bits.unsigned()  # reference frames
    gaps_allowed = bool(bits.take(1))
    bits.unsigned()  # width
    bits.unsigned()  # height
    return number, _Sequence(bool(bits.take(1)), separate_planes, frame_number_bits, gaps_allowed)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    if not bits.take(1):
        return
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) & 255
        last = following or last


def _configured(extradata: bytes) -> Iterator[bytes]:
    """Parameter sets of an `avcC` box (ISO/IEC 14496-15 5.3.3.1)."""
    at = 5
    for mask in (0x1F, 0xFF):
        if at >= len(extradata):
            return
        count, at = extradata[at] & mask, at + 1
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            if size:
                yield extradata[at + 2 : at + 2 + size]
            at += 2 + size

"""Which packets of an H.264 stream show no frame of their own: the second field of a picture whose first field came in a packet before.

Takes packets in decode order (start codes or length prefixes). Gives yes or no for each. Reads sequence parameter sets up to
`frame_mbs_only_flag` and slice headers up to `bottom_field_flag` (ITU-T H.264 7.3.2.1, 7.3.2.2, 7.3.3). Part of the decode package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SLICES = (1, 5)  # NAL unit types: a slice, of an IDR picture or another
NO_PICTURE = (6, 7, 8, 9, 10, 11, 12, 13, 15)  # messages, parameters, delimiters, ends, filler
SPS, PPS = 7, 8
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # with chroma format and scaling lists


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[start, end)` of a packet: a NAL unit, its header byte first."""

    start: int
    end: int


def nal_length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length in front of each NAL unit; 0 means start codes."""
    at, shortest = (21, 22) if codec == "hevc" else (4, 6)
    configured = len(extradata) > shortest and extradata[0] == 1
    return (extradata[at] & 3) + 1 if configured else 0


def nal_units(data: bytes, length_size: int) -> Iterator[Span]:
    """NAL units of a packet, empty ones left out."""
    position = 0
    while length_size and position + length_size < len(data):
        start = position + length_size
        position = start + int.from_bytes(data[position:start], "big")
        if start < position:
            yield Span(start, min(position, len(data)))
    while not length_size and 0 <= (position := data.find(b"\0\0\1", position)) < len(data) - 3:
        following = data.find(b"\0\0\1", position + 3)
        end = len(data) if following < 0 else following
        if position + 3 < end:
            yield Span(position + 3, end)
        position += 3


def unescape(data: bytes) -> bytes:
    """Payload of a NAL unit without its emulation prevention bytes."""
    return data.replace(b"\0\0\3", b"\0\0")


class FieldPairs:
    """Remembers parameter sets and the last unpaired first field."""

    LOOK_BYTES = 16 * 1024  # of a packet: its parameter sets, messages and first slice header

    def __init__(self, extradata: bytes) -> None:
        """`extradata` holds the parameter sets where the container keeps them."""
        self._length_size = nal_length_size("h264", extradata)
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}  # picture parameter set -> sequence parameter set
        self._field: tuple[int, bool] | None = (
            None  # frame number and parity of a first field that waits for its second
        )
        for unit in (
            _configured(extradata)
            if self._length_size
            else [extradata[s.start : s.end] for s in nal_units(extradata, 0)]
        ):
            self._remember(unit)

    @property
    def unlikely(self) -> bool:
        """Whether the container says beforehand that each packet holds a picture, and that none has fields: only keyframes
        could say otherwise.
        """
        known = self._sequences.values()
        return bool(self._length_size and known) and all(sequence.frames_only for sequence in known)

    def shows_none(self, data: bytes) -> bool:
        """Whether the packet that begins with `data` completes the picture of the packet before it, or holds no picture at all."""
        end = 0
        for span in nal_units(data, self._length_size):
            kind, end = data[span.start] & 0x1F, span.end
            if kind in (SPS, PPS):
                self._remember(data[span.start : span.end])
            elif kind in SLICES:
                return self._pair(self._slice(data[span.start : span.end][:64]))
            elif kind not in NO_PICTURE:
                return False
        return end == len(data) < self.LOOK_BYTES  # a packet that is damaged may have held one

    def _pair(self, field: tuple[int, bool] | None) -> bool:
        waiting, self._field = self._field, field
        if field is None or waiting is None or waiting[0] != field[0] or waiting[1] == field[1]:
            return False
        self._field = None
        return True

    def _remember(self, unit: bytes) -> None:
        try:
            bits = _Bits(unescape(unit[1:]))
            if unit[0] & 0x1F == SPS:
                number, sequence = _read_sequence(bits)
                self._sequences[number] = sequence
            elif unit[0] & 0x1F == PPS:
                number = bits.unsigned()
                self._sequence_of[number] = bits.unsigned()
        except IndexError:  # cut short: the decoder will complain
            return

    def _slice(self, unit: bytes) -> tuple[int, bool] | None:
        """Frame number and parity of a slice of a field; None for a slice of a frame."""
        if all(sequence.frames_only for sequence in self._sequences.values()):
            return None
        try:
            bits = _Bits(unescape(unit[1:]))
            bits.unsigned()  # first_mb_in_slice
            bits.unsigned()  # slice_type
            sequence = self._sequences.get(self._sequence_of.get(bits.unsigned(), -1))
            if sequence is None or sequence.frames_only:
                return None
            bits.take(2 if sequence.separate_planes else 0)
            frame_number = bits.take(sequence.frame_number_bits)
            is_field = bits.take(1)
            return (frame_number, bool(bits.take(1))) if is_field else None
        except IndexError:
            return None


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What of a sequence parameter set a slice header is read with."""

    frames_only: bool
    separate_planes: bool
    frame_number_bits: int


class _Bits:
    """Reads bits, and numbers in Exp-Golomb code. Raises IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._data[self._at >> 3] >> (7 - (self._at & 7)) & 1
            self._at += 1
        return value

    def unsigned(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 32:
                raise IndexError("no number in Exp-Golomb code")
        return (1 << zeros) - 1 + self.take(zeros)

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
    bits.take(1)
    bits.unsigned()  # width
    bits.unsigned()  # height
    return number, _Sequence(bool(bits.take(1)), separate_planes, frame_number_bits)


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

"""Tests of encoded packets by their first bytes, without decoding. Part of the decode package.

They say where decoding may begin (`point_test`) and which packets show no frame of their own (`hidden_test`).
Sources: ITU-T H.264 7.3 and D.2.8, ITU-T H.265 7.4.2, RFC 6386 9.1 (VP8), the VP9 bitstream specification 6.2 and Annex B, the AV1
bitstream specification 5.3, 5.5 and 5.9.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

from pipeline.video.decode.h264_pictures import nal_length_size, nal_units, unescape

INTRA_ONLY = {
    "mjpeg", "prores", "ffv1", "rawvideo", "dnxhd", "jpeg2000", "huffyuv", "ffvhuff", "png", "utvideo", "v210",
    "cfhd", "dvvideo", "magicyuv",
}  # fmt: skip
EXACT_KEYFRAMES = {"vp8", "vp9", "av1"} | INTRA_ONLY
IDR_SLICE, SEI = 5, 6  # H.264 NAL unit types
RECOVERY_POINT = 6  # SEI payload type
HEVC_IRAP = range(16, 22)  # HEVC NAL unit types: BLA, IDR, CRA
HEVC_NO_PICTURE = range(32, 41)  # parameters, delimiters, ends, filler, messages
LOOK_BYTES = 16 * 1024  # read of a packet that begins with parameters or messages
HEVC_NO_LEADING = (18, 20)  # keyframes that are not followed by pictures shown before them

AV1_SEQUENCE, AV1_FRAMES = 1, (3, 6, 7)  # AV1 OBU types


class Point(IntEnum):
    """How independent a packet is of those before it. Each value includes the ones below it."""

    NONE = 0
    CLEAN = 1  # frames shown from here on do not depend on earlier damage
    EXACT = (
        2  # decoding may begin here: frames shown from here on have the same pixels as in a decode from the beginning
    )
    CLOSED = 3  # all packets before it show earlier frames, and all after it later ones


def point_test(stream: Any) -> Callable[[Any], Point]:
    """A function that returns the `Point` of a keyframe packet of `stream`.

    An H.264 "keyframe" may be a recovery point (intra refresh, open GOP with references across it); only an IDR picture is independent.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec in EXACT_KEYFRAMES:
        return lambda packet: Point.CLOSED
    if codec not in ("h264", "hevc"):
        return lambda packet: Point.CLEAN
    length_size = nal_length_size(codec, stream.codec_context.extradata or b"")
    if codec == "h264":
        return lambda packet: _h264_point(bytes(packet), length_size)
    return lambda packet: _hevc_point(bytes(packet), length_size)


def hidden_test(stream: Any) -> Callable[[Any], bool] | None:
    """A function that returns whether a packet shows no frame of its own; None for codecs whose packets all show one.

    These are hidden reference frames of VP8, VP9 and AV1, and packets of H.265 with parameters or messages but no picture. For H.264 see
    `h264_pictures`.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec == "vp8":
        return lambda packet: not memoryview(packet)[0] >> 4 & 1
    if codec == "vp9":
        return lambda packet: not _vp9_shows(bytes(packet))
    if codec == "av1":
        return lambda packet: not _av1_shows(bytes(packet))
    if codec == "hevc":
        length_size = nal_length_size(codec, stream.codec_context.extradata or b"")
        return lambda packet: _hevc_shows_none(packet, length_size)
    return None


def _h264_point(data: bytes, length_size: int) -> Point:
    recovers = False
    for unit in nal_units(data, length_size):
        kind = data[unit.start] & 0x1F
        if kind == IDR_SLICE:
            return Point.CLOSED
        if kind == SEI and not recovers:
            recovers = _recovers_at_once(unescape(data[unit.start + 1 : unit.start + 1 + 4096]))
    return Point.CLEAN if recovers else Point.NONE


def _recovers_at_once(payloads: bytes) -> bool:
    """Whether SEI messages hold a recovery point with `recovery_frame_cnt` 0 (a first bit of 1)."""
    at = 0
    while at + 2 < len(payloads):
        kind, at = _varying(payloads, at)
        size, at = _varying(payloads, at)
        if kind == RECOVERY_POINT:
            return at < len(payloads) and payloads[at] >> 7 == 1
        at += size
    return False


def _varying(data: bytes, at: int) -> tuple[int, int]:
    """A number of an SEI message (bytes of 255 and a last byte, added up), and the position behind it."""
    value = 0
    while at < len(data) and data[at] == 255:
        value, at = value + 255, at + 1
    return value + (data[at] if at < len(data) else 0), at + 1


def _hevc_point(data: bytes, length_size: int) -> Point:
    kinds = {data[unit.start] >> 1 & 0x3F for unit in nal_units(data, length_size)} & set(HEVC_IRAP)
    if not kinds:
        return Point.NONE
    return Point.CLOSED if kinds <= set(HEVC_NO_LEADING) else Point.EXACT


def _hevc_shows_none(packet: Any, length_size: int) -> bool:
    view, size = memoryview(packet), packet.size
    if length_size and size > length_size and view[length_size] >> 1 & 0x3F not in HEVC_NO_PICTURE:
        return False
    data = bytes(view[:LOOK_BYTES])
    end = 0
    for unit in nal_units(data, length_size):
        if data[unit.start] >> 1 & 0x3F not in HEVC_NO_PICTURE:
            return False
        end = unit.end
    return end == size  # else it was not read to its end, or is damaged, and may hold a picture


def _vp9_shows(data: bytes) -> bool:
    return any(_vp9_frame_shows(data[start]) for start in _vp9_frames(data))


def _vp9_frames(data: bytes) -> Iterator[int]:
    """Positions of the frames in a packet. A superframe holds several and has an index at its end."""
    marker = data[-1]
    count, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index_bytes = 2 + count * size_bytes
    if marker >> 5 != 0b110 or len(data) < index_bytes or data[-index_bytes] != marker:
        yield 0
        return
    at = 0
    for n in range(count):
        if at >= len(data) - index_bytes:
            return
        yield at
        place = len(data) - index_bytes + 1 + n * size_bytes
        at += int.from_bytes(data[place : place + size_bytes], "little")


def _vp9_frame_shows(header: int) -> bool:
    """Whether a frame is shown, by the first byte of its uncompressed header."""
    profile = header >> 5 & 1 | header >> 3 & 2  # the low bit comes first
    spare = 3 if profile < 3 else 2  # bits behind the profile, without the reserved one
    show_existing = header >> spare & 1
    return bool(show_existing or header >> (spare - 2) & 1)


def _av1_shows(data: bytes) -> bool:
    at, frames = 0, 0
    while at < len(data):
        header = data[at]
        kind, at = header >> 3 & 15, at + 1 + (header >> 2 & 1)
        size = len(data) - at
        if header >> 1 & 1:
            size, at = _leb128(data, at)
        if at >= len(data):
            break
        if kind == AV1_SEQUENCE and data[at] >> 3 & 1:
            return True  # a still picture with a reduced header
        if kind in AV1_FRAMES and size:
            frames += 1
            if data[at] >> 7 or data[at] >> 4 & 1:  # show_existing_frame, show_frame
                return True
        at += size
    return not frames  # a packet without a frame is damaged, and may have held one


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(8):
        if at >= len(data):
            break
        value, at = value | (data[at] & 0x7F) << 7 * n, at + 1
        if not data[at - 1] >> 7:
            break
    return value, at

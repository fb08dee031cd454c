"""Interlaced H.264 whose fields are separate pictures, as cameras record it. libav cannot encode it, so the stream is written here, with
uncompressed macroblocks (I_PCM) in field pictures.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from tests.odd_inputs.numbered import HEIGHT, WIDTH, draw

START = b"\0\0\0\1"
SPS, PPS, IDR, SLICE = 0x67, 0x68, 0x65, 0x61  # NAL headers with a reference index
GROUP = 24
PCM = 25  # mb_type in an I slice


class Bits:
    """Bits, most significant first."""

    def __init__(self) -> None:
        self.text: list[str] = []

    def u(self, width: int, value: int) -> Bits:
        """Unsigned, of a fixed width."""
        self.text.append(f"{value:0{width}b}")
        return self

    def ue(self, *values: int) -> Bits:
        """Exponential Golomb codes."""
        for value in values:
            digits = f"{value + 1:b}"
            self.text.append("0" * (len(digits) - 1) + digits)
        return self

    def aligned(self, one: str = "0") -> bytes:
        """All of it; the last byte is filled with zeros after `one`."""
        text = "".join(self.text)
        text += one if len(text) % 8 or one == "1" else ""
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")


def nal(header: int, payload: bytes) -> bytes:
    """One NAL unit behind its start code, with emulation prevention."""
    made, zeros = bytearray([header]), 0
    for value in payload:
        if zeros >= 2 and value <= 3:
            made.append(3)
            zeros = 0
        made.append(value)
        zeros = zeros + 1 if value == 0 else 0
    return START + bytes(made)


def _parameter_sets() -> bytes:
    sps = Bits().u(8, 77).u(8, 0).u(8, 30).ue(0, 4, 0, 4, 1).u(1, 0).ue(WIDTH // 16 - 1, HEIGHT // 32 - 1)
    sps.u(1, 0).u(1, 0).u(1, 1).u(1, 0)  # fields are possible, none within a frame, direct inference, no cropping
    sps.u(1, 1).u(4, 0).u(1, 1).u(32, 1).u(32, 50).u(1, 1).u(4, 0)  # 50 fields a second
    pps = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(1, 1).u(2, 0)
    return nal(SPS, sps.aligned("1")) + nal(PPS, pps.aligned("1"))


def _field(planes: list[np.ndarray], number: int, bottom: int) -> bytes:
    """One field picture: every second line of each plane."""
    position = number % GROUP
    idr = position == 0 and not bottom
    header = Bits().ue(0, 7, 0).u(8, position).u(1, 1).u(1, bottom)
    if idr:
        header.ue(0)
    header.u(8, (2 * position + bottom) % 256).u(2 if idr else 1, 0).ue(0, 1)
    lines = [plane[bottom::2] for plane in planes]
    payload = b""
    for row in range(HEIGHT // 32):
        for column in range(WIDTH // 16):
            bits = header if row == column == 0 else Bits()
            payload += bits.ue(PCM).aligned()
            for plane, side in zip(lines, (16, 8, 8), strict=True):
                payload += plane[row * side : row * side + side, column * side : column * side + side].tobytes()
    return nal(IDR if idr else SLICE, payload + b"\x80")


def field_packets(numbers: range) -> Iterator[bytes]:
    """Two packets a frame: the top field, then the bottom field."""
    for position, number in enumerate(numbers):
        frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24").reformat(format="yuv420p")
        array = frame.to_ndarray()
        luma, chroma = array[:HEIGHT], array[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        planes = [np.clip(plane, 1, 254) for plane in (luma, *chroma)]  # 0 and 255 are forbidden in PCM samples
        top = _field(planes, position, 0)
        yield (_parameter_sets() if position % GROUP == 0 else b"") + top
        yield _field(planes, position, 1)


def fields_as_packets(container: str = "mpegts", frames: int = 48) -> bytes:
    """25 frames per second, each in two packets of 20 ms: 0 to `frames` - 1."""
    packets = list(field_packets(range(frames)))
    if container == "h264":
        return b"".join(packets)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for position, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.pts = packet.dts = position
            packet.is_keyframe = position % (2 * GROUP) == 0
            output.mux(packet)
    return buffer.getvalue()

"""Videos with packets without times, and elementary streams. Each function returns bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

import av

from tests.odd_inputs import boxes
from tests.odd_inputs.numbered import MPEG, X264, X264_B, X265, encode
from tests.odd_inputs.remux import remux

MILLISECONDS = Fraction(1, 1000)
_OPEN = "keyint=22:scenecut=0:open-gop=1:bframes=4:b-adapt=0:b-pyramid=0:rc-lookahead=30"
OPEN_GOP = {**X265, "x265-params": f"log-level=none:pools=none:frame-threads=1:{_OPEN}"}


def irregular_times(count: int, seed: int = 7) -> list[int]:
    """Milliseconds of `count` frames that last 40 to 240 ms each."""
    rng = random.Random(seed)
    times = [0]
    while len(times) < count:
        times.append(times[-1] + rng.choice((40, 80, 120, 160, 240)))
    return times


def open_gop_cut(container: str) -> bytes:
    """Frames 22-95 of a variable-rate HEVC with open groups, cut by stream copy at a key frame whose three leading pictures cannot be
    decoded. In Matroska those have no time.
    """
    data = encode(range(96), "mp4", "libx265", options=OPEN_GOP, pts=irregular_times(96), time_base=MILLISECONDS)

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        first = next(n for n, packet in enumerate(packets) if packet.is_keyframe and n)
        start = packets[first].pts
        for packet in packets[first:]:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            yield packet

    return remux(data, container, edit, {"avoid_negative_ts": "disabled"})


def timeless_blocks(*positions: int, codec: str = "libx264", options: dict[str, str] | None = None) -> bytes:
    """Matroska with a variable rate, whose packets at `positions` have no time. Frames 0-71."""
    options = options or (X264 if codec == "libx264" else None)
    data = encode(
        range(72),
        "matroska",
        codec,
        options=options,
        pts=irregular_times(72),
        time_base=MILLISECONDS,
        container_options={"write_crc32": "0"},
    )
    return boxes.without_block_times(data, positions)


def timeless_transport(*positions: int, codec: str = "libx264", options: dict[str, str] | None = None) -> bytes:
    """MPEG-TS with a constant rate, whose packets at `positions` have no time. Frames 0-71."""
    made = bytearray(encode(range(72), "mpegts", codec, options=options))
    position = 0
    for at in range(0, len(made), 188):
        start = made.find(b"\0\0\1\xe0", at, at + 188)
        if start < 0:
            continue
        if position in positions:
            size = made[start + 8]
            made[start + 7] &= 0x3F  # neither a presentation nor a decode time
            made[start + 9 : start + 9 + size] = b"\xff" * size
        position += 1
    return bytes(made)


def program_stream(codec: str = "mpeg2video", options: dict[str, str] | None = None) -> bytes:
    """MPEG-PS, where only the first frame that begins in a pack has a time. Frames 0-71."""
    return encode(range(72), "mpeg", codec, options=options)


def elementary(codec: str, container: str, fps: Fraction | int) -> bytes:
    """A raw stream of frames 0-47 with the rate in its sequence header."""
    if codec == "libx265":
        return encode(range(48), container, codec, options=X265, fps=fps)
    options = X264 if codec == "libx264" else {**MPEG, "bf": "0"}
    return encode(range(48), container, codec, options=options, fps=fps)


def elementary_with_b_frames() -> bytes:
    """A raw H.264 stream with reordered frames, 30 fps: 0-47."""
    return encode(range(48), "h264", options=X264_B, fps=30)

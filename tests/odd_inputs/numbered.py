"""Test videos whose frames show their own number: eight blocks (bit k white = 2^k) in a band across the middle, and four corner colours.

`encode(numbers, ...)` -> bytes of a video; `number_of(planes)` reads a decoded frame. Numbers are 0 to 255.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import av
import numpy as np

from tests import video_files

os.environ.setdefault("SVT_LOG", "0")  # SVT-AV1 writes to stderr and has no other switch

WIDTH, HEIGHT = 96, 64
CORNERS = (
    (220, 20, 20),
    (20, 200, 20),
    (20, 20, 220),
    (220, 220, 20),
)  # top left, top right, bottom left, bottom right
X264 = {"preset": "ultrafast", "g": "24", "keyint_min": "24", "sc_threshold": "0", "crf": "16"}
X264_B = {**X264, "bf": "2", "x264-params": "b-adapt=0:no-scenecut=1", "preset": "veryfast"}
X265 = {
    "preset": "ultrafast",
    "crf": "16",
    "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=24:min-keyint=24:scenecut=0",
}
MPEG = {"g": "24", "b": "1500k", "sc_threshold": "1000000000"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "24", "b": "800k"}
VP8 = {**VP9, "lag-in-frames": "0"}
AV1 = {"preset": "13", "g": "24", "svtav1-params": "lp=1", "crf": "20"}


@functools.cache
def draw(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Frame `number` as (height, width, 3) uint8 RGB."""
    y, x = np.mgrid[0:height, 0:width]
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0], frame[..., 1], frame[..., 2] = 60 + 80 * x // width, 60 + 80 * y // height, 100
    side, block = height // 5, width // 8
    for colour, (rows, columns) in zip(CORNERS, _corners(side), strict=True):
        frame[rows, columns] = colour
    for k in range(8):
        frame[2 * height // 5 : 3 * height // 5, k * block : (k + 1) * block] = 235 if number >> k & 1 else 20
    return frame


def _corners(side: int) -> list[tuple[slice, slice]]:
    first, last = slice(0, side), slice(-side, None)
    return [(first, first), (first, last), (last, first), (last, last)]


def number_of(planes_3HW: np.ndarray) -> int:
    """The number of a decoded frame (Y first) of any size that shows the whole picture."""
    luma = planes_3HW[0]
    height, width = luma.shape
    band = luma[9 * height // 20 : 11 * height // 20].mean(0)
    return sum(
        1 << k for k in range(8) if band[k * width // 8 + width // 32 : (k + 1) * width // 8 - width // 32].mean() > 128
    )


def corner_colours(rgb_HW3: np.ndarray) -> list[tuple[int, ...]]:
    """Mean RGB inside each corner square: top left, top right, bottom left, bottom right."""
    side = rgb_HW3.shape[0] // 5
    inner = max(1, side // 4)
    squares = [rgb_HW3[rows, columns][inner:-inner, inner:-inner] for rows, columns in _corners(side)]
    return [tuple(round(float(c)) for c in square.mean((0, 1))) for square in squares]


def encode(
    numbers: Iterable[int],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    options: dict[str, str] | None = None,
    fps: Any = 24,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **settings: Any,
) -> bytes:
    """A video of the numbered frames in the order given; `settings` as in `tests.video_files.write`."""
    pictures: Sequence[np.ndarray] = [draw(number, size[1], size[0]) for number in numbers]
    if options is None:
        options = DEFAULTS.get(codec, {})
    return video_files.encode(
        pictures,
        size=size,
        container=container,
        codec=codec,
        options=options,
        fps=fps,
        source_format="rgb24",
        **settings,
    )


DEFAULTS = {
    "libx264": X264,
    "libx265": X265,
    "mpeg2video": MPEG,
    "mpeg1video": MPEG,
    "mpeg4": MPEG,
    "libvpx-vp9": VP9,
    "libvpx": VP8,
    "libsvtav1": AV1,
}


def decode_with_libav(data: bytes) -> list[av.VideoFrame]:
    """Every frame of the first video stream as libav gives it: all packets in file order, default settings."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return [frame for packet in container.demux(stream) for frame in _frames(packet)]


def _frames(packet: av.Packet) -> list[av.VideoFrame]:
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


def number_in(frame: av.VideoFrame) -> int:
    """The number of a libav frame."""
    return number_of(frame.reformat(format="yuv444p").to_ndarray())

"""Real encoded videos for tests, made on the spot with PyAV. Frames carry their index, so that a test can read back what it got.

`encode(...)` -> bytes. Each frame is a luma ramp whose mean names the index (see `luma_of`), with a coloured moving block.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SMALL = 64


def luma_of(index: int) -> int:
    """The limited-range luma that frame `index` is filled with: 13 apart, wraps after 16 frames."""
    return 24 + index % 16 * 13


def numbered(index: int, width: int, height: int) -> np.ndarray:
    """Planar 8-bit YUV 4:2:0 (`3H/2 x W`) of flat luma `luma_of(index)` and neutral chroma."""
    frame = np.full((height * 3 // 2, width), 128, np.uint8)
    frame[:height] = luma_of(index)
    return frame


def textured(index: int, width: int, height: int) -> np.ndarray:
    """Planar YUV 4:2:0 with moving gradients and a block: something with detail, for bit-equality and quality tests."""
    y, x = np.mgrid[:height, :width]
    luma = 40 + (x * 3 + y + index * 5) % 160
    block = (abs(x - (index * 7) % width) < width // 8) & (abs(y - height // 2) < height // 8)
    luma = np.where(block, 220, luma)
    chroma_u = 90 + (x[::2, ::2] + index * 3) % 70
    chroma_v = 160 - (y[::2, ::2] + index) % 60
    chroma = np.concatenate([chroma_u.reshape(-1), chroma_v.reshape(-1)]).reshape(height // 2, width)
    return np.concatenate([luma, chroma]).astype(np.uint8)


def encode(frames: int | Sequence[np.ndarray] = 8, **settings: Any) -> bytes:
    """What `write` writes, as bytes."""
    flags = settings.get("container_options", {}).get("movflags", "")
    if "faststart" in flags:  # the muxer reads its own output again
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            write(file.name, frames, **settings)
            return Path(file.name).read_bytes()
    buffer = io.BytesIO()
    write(buffer, frames, **settings)
    return buffer.getvalue()


def write(
    target: str | io.BytesIO,
    frames: int | Sequence[np.ndarray] = 8,
    *,
    size: tuple[int, int] = (SMALL, SMALL),
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: Fraction | int = 30,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    picture: Any = numbered,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: float | None = None,
    hflip: bool = False,
    aspect: Fraction | None = None,
    tags: dict[str, int] | None = None,
    source_format: str = "yuv420p",
    audio: bool = False,
) -> None:
    """Encodes `frames` pictures (a count, or arrays in `source_format`) of `size` (height, width).

    `pts` are presentation times in `time_base` (default 1/fps). `tags` sets frame colour attributes (`colorspace`, `color_range`,
    `color_trc`, `color_primaries`).
    """
    height, width = size
    output = av.open(target, "w", format=container, options=container_options or {})
    stream: Any = output.add_stream(codec, rate=fps, options=options or {})
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.thread_count = 1
    if time_base is not None:
        stream.codec_context.time_base = time_base
    if aspect is not None:
        stream.codec_context.sample_aspect_ratio = aspect
    if rotation is not None or hflip:
        stream.set_display_rotation(rotation or 0, hflip=hflip)
    for name, value in (tags or {}).items():
        setattr(stream.codec_context, name, value)
    sound: Any = output.add_stream("aac", rate=48000) if audio else None
    pictures = (picture(i, width, height) for i in range(frames)) if isinstance(frames, int) else frames
    for index, array in enumerate(pictures):
        frame: Any = (
            array if isinstance(array, av.VideoFrame) else av.VideoFrame.from_ndarray(array, format=source_format)
        )
        frame.pts = pts[index] if pts is not None else index
        frame.time_base = time_base or 1 / Fraction(fps)
        for name, value in (tags or {}).items():
            setattr(frame, name, value)
        for packet in stream.encode(frame):
            output.mux(packet)
    for packet in stream.encode():
        output.mux(packet)
    if sound is not None:
        _silence(output, sound)
    output.close()


def _silence(output: Any, stream: Any) -> None:
    samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024 * 2), np.int16), format="s16", layout="stereo")
    samples.sample_rate = 48000
    for packet in [*stream.encode(samples), *stream.encode()]:
        output.mux(packet)


def audio_only() -> bytes:
    """An mp4 with sound and no picture."""
    buffer = io.BytesIO()
    output = av.open(buffer, "w", format="mp4")
    _silence(output, output.add_stream("aac", rate=48000))
    output.close()
    return buffer.getvalue()

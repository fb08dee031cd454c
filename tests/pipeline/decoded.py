"""Decoded frames as arrays, for tests with `tests.video_files`."""

from __future__ import annotations

import numpy as np

from pipeline.config import DecodeConfig, validate
from pipeline.video.decode import Video, open_video
from pipeline.video.decode.planes import Geometry

FAST = {"preset": "ultrafast"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
LIMITS: DecodeConfig = validate(DecodeConfig, {})
HDR = {"colorspace": 9, "color_trc": 16, "color_primaries": 9}


def limits(**values: object) -> DecodeConfig:
    return validate(DecodeConfig, values)


def planes(video: Video, indices: list[int] | range, height: int = 0, width: int = 0) -> np.ndarray:
    """Frames at `indices`, scaled without a crop to the given size (default: as shown)."""
    height, width = height or video.info.height, width or video.info.width
    return video.planes(np.array(indices), Geometry(height, width, 0, 0, height, width))


def lumas(data: bytes, config: DecodeConfig = LIMITS) -> list[int]:
    """Mean luma of each frame; for `numbered` pictures it identifies the frame."""
    video = open_video(data, config)
    try:
        return [round(frame[0].mean()) for frame in planes(video, range(video.info.num_frames))]
    finally:
        video.close()

"""What changes inside a video: pixel format, size, aspect ratio, colour, interlacing. They are shown right, or refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.video.decode import open_video
from tests.pipeline.decoded import FAST, LIMITS, planes
from tests.video_files import encode

FIELDS = {**FAST, "flags": "+ildct+ilme", "x264-params": "tff=1", "qp": "4"}
COUNT = 12


def ramp(height: int = 128, width: int = 128) -> np.ndarray:
    """RGB from dark to bright, top to bottom: the same at any size."""
    levels = np.linspace(40, 220, height).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None], (height, width, 3)).copy()


def segment(size: tuple[int, int] = (128, 128), **settings: object) -> bytes:
    """A transport stream of `COUNT` frames `ramp`; such files can be joined."""
    return encode([ramp(*size)] * COUNT, size=size, container="mpegts", source_format="rgb24", **settings)


# --- deinterlacing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"pix_fmt": "yuv422p"}),
        ({"pix_fmt": "yuv422p"}, {}),
        ({}, {"pix_fmt": "yuv420p10le"}),
        ({"pix_fmt": "yuv420p10le"}, {}),
        ({"size": (64, 64)}, {}),
        ({}, {"size": (64, 64)}),
        ({"size": (512, 512)}, {"size": (64, 64)}),
    ],
)
def test_frames_of_another_format_or_size_are_deinterlaced_as_what_they_are(first, second):
    video = open_video(segment(**first, options=FIELDS) + segment(**second, options=FIELDS), LIMITS)
    assert "deinterlaced" in video.info.warnings
    shown = planes(video, range(2 * COUNT), 64, 64)
    assert len(shown) == video.info.num_frames == 2 * COUNT
    np.testing.assert_allclose(shown.astype(int), np.broadcast_to(shown[3].astype(int), shown.shape), atol=3)

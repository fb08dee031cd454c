"""What changes inside a video: pixel format, size, aspect ratio, colour, interlacing. They are shown right, or refused with the reason."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.errors import PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.planes import Geometry
from tests.pipeline.decoded import FAST, HDR, LIMITS, X265, limits, planes
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


# --- what the first frame decides -------------------------------------------------------------------------------------


def colour(matrix: int, options: dict[str, str] = FAST) -> bytes:
    """A transport stream whose frames have the tag `matrix`."""
    return encode(COUNT, container="mpegts", options=options, tags={"colorspace": matrix})


def hdr(**tags: int) -> bytes:
    """A segment of 10-bit HEVC with these tags."""
    return segment(codec="libx265", pix_fmt="yuv420p10le", options=X265, tags=tags)


def stretched(numerator: int, denominator: int = 1) -> bytes:
    """A segment with this sample aspect ratio."""
    return segment(options=FAST, aspect=Fraction(numerator, denominator))


def reasons(data: bytes, config: DecodeConfig = LIMITS, *, enlarge: bool = True) -> list[str]:
    """The reason of the reject of each frame, empty for frames that are shown."""
    video = open_video(data, config)
    size = video.info.height, video.info.width
    out_3HW, found = np.empty((3, *size), np.uint8), []
    for index in range(video.info.num_frames):
        try:
            video.show(index).write(out_3HW, Geometry(*size, 0, 0, *size, enlarge=enlarge))
            found.append("")
        except PolicyReject as error:
            found.append(error.reason)
    video.close()
    return found


SAME = [""] * COUNT


@pytest.mark.parametrize("options", [FAST, FIELDS], ids=["progressive", "interlaced"])
def test_frames_of_another_matrix_are_refused(options):
    first, second = colour(1, options=options), colour(6, options=options)
    assert reasons(first + second) == [*SAME, *["color_changed"] * COUNT]
    assert reasons(first + second + first) == [*SAME, *["color_changed"] * COUNT, *SAME]
    assert reasons(first + colour(8, options=options)) == [*SAME, *["color_matrix"] * COUNT]


def test_tags_that_are_missing_or_mean_the_same_are_no_change():
    assert set(reasons(colour(5) + colour(6))) == {""}  # both are BT.601
    assert set(reasons(colour(2) + colour(6) + colour(2))) == {""}  # untagged, taken for BT.601 before the tag comes
    assert reasons(colour(2) + colour(1)) == [*SAME, *["color_changed"] * COUNT]


@pytest.mark.parametrize("policy", ["reject", "convert"])
def test_hdr_behind_sdr_is_not_stored_as_sdr(policy):
    sdr = hdr(colorspace=1, color_trc=1, color_primaries=1)
    assert reasons(sdr + hdr(**HDR), limits(hdr=policy)) == [*SAME, *["color_changed"] * COUNT]
    if policy == "convert":
        assert reasons(hdr(**HDR) + sdr, limits(hdr=policy)) == [*SAME, *["color_changed"] * COUNT]


def test_frames_of_another_sample_aspect_are_refused():
    assert reasons(stretched(1) + stretched(2) + stretched(1)) == [*SAME, *["size_changed"] * COUNT, *SAME]
    assert set(reasons(stretched(16, 15) + stretched(59, 54))) == {""}  # 2 %: two conventions for the same picture
    narrow = segment((128, 64), options=FAST, aspect=Fraction(2))
    assert set(reasons(stretched(1) + narrow)) == {""}  # the same shape on screen


def test_a_clip_that_passes_over_refused_frames_stands():
    data = stretched(1) + segment((128, 32), options={**FAST, "g": "4"}) + stretched(1)
    video = open_video(data, LIMITS)
    assert len(planes(video, [0, 2 * COUNT, 2 * COUNT + 3])) == 3


def test_frames_that_shrink_are_refused_unless_they_may_be_enlarged():
    data = segment(options=FAST) + segment((64, 64), options=FAST) + segment((256, 256), options=FAST)
    assert reasons(data, enlarge=False) == [*SAME, *["size_changed"] * COUNT, *SAME]
    assert set(reasons(data)) == {""}
    shown = np.empty((3, 64, 64), np.uint8)
    open_video(data, LIMITS).show(COUNT).write(shown, Geometry(64, 64, 0, 0, 64, 64, enlarge=False))


# --- interlacing that begins later ------------------------------------------------------------------------------------


def combs(first: int, options: dict[str, str]) -> bytes:
    """A transport stream whose bar moves 6 pixels a field, from field `2 * first` on: its edges are combs."""
    frames = []
    for index in range(first, first + COUNT):
        frame = np.full((96, 96), 128, np.uint8)
        frame[:64] = 40
        for line in (0, 1):
            left = 6 * (2 * index + line) % 80
            frame[line:64:2, left : left + 16] = 200
        frames.append(frame)
    return encode(frames, size=(64, 96), container="mpegts", options=options)


def combed(luma_HW: np.ndarray) -> float:
    return float(abs(np.diff(luma_HW[8:-8].astype(int), axis=0)).mean())


def test_frames_that_are_interlaced_only_later_follow_the_policy():
    progressive = segment((64, 96), options=FAST)
    interlaced = combs(0, FIELDS)
    data = progressive + interlaced
    assert reasons(data, limits(interlaced="reject")) == [*SAME, *["interlaced"] * COUNT]
    kept = planes(open_video(data, limits(interlaced="keep")), range(2 * COUNT))
    flat = planes(open_video(data, LIMITS), range(2 * COUNT))
    np.testing.assert_array_equal(flat[:COUNT], kept[:COUNT])
    alone = planes(open_video(interlaced, LIMITS), range(COUNT))
    np.testing.assert_array_equal(flat[COUNT + 1 :], alone[1:])  # bwdif also reads the frame before
    for index in range(COUNT, 2 * COUNT):
        assert combed(kept[index, 0]) > 5 * combed(flat[index, 0])


def test_pixels_do_not_depend_on_where_deinterlacing_began():
    data = segment((64, 96), options=FAST) + combs(0, FIELDS) + combs(COUNT, FIELDS)
    every = planes(open_video(data, LIMITS), range(3 * COUNT))
    for indices in (
        [0, COUNT + 3],
        [COUNT - 1, COUNT],
        [2 * COUNT],
        [2 * COUNT + 5, 3 * COUNT - 1],
        [3, 3 * COUNT - 2],
    ):
        np.testing.assert_array_equal(planes(open_video(data, LIMITS), indices), every[indices])

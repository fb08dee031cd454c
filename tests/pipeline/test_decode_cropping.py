"""Cropping of the container (PixelCrop, `clap`) with rotation, sample aspect ratio, fields and ranges."""

from __future__ import annotations

import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BadDataError
from pipeline.video.decode import Video, open_video
from pipeline.video.decode.container import OpenContainer
from pipeline.video.decode.cropping import Cropper, Margins
from pipeline.video.decode.encoded_file import MemoryFile
from pipeline.video.decode.matroska_crop import impossible_crops
from tests.pipeline.cropped_files import with_box, with_clap, with_pixel_crop
from tests.pipeline.decoded import FAST, LIMITS, planes
from tests.video_files import encode

HEIGHT, WIDTH = 120, 160
LEFT, TOP = 20, 10  # of the picture in its padding
INNER = 80, 96  # height, width
PADDING = 30
VIDEO_CROPS = {b"\x54\xcc", b"\x54\xdd", b"\x54\xbb", b"\x54\xaa"}
CORNERS = [[60, 100], [150, 210]]


def padded(*_: int) -> np.ndarray:
    """Four quarters of `CORNERS` within padding, 4:2:0."""
    luma = np.full((HEIGHT, WIDTH), PADDING, np.uint8)
    luma[TOP : TOP + INNER[0], LEFT : LEFT + INNER[1]] = np.kron(CORNERS, np.ones((INNER[0] // 2, INNER[1] // 2)))
    return np.concatenate([luma, np.full((HEIGHT // 2, WIDTH), 128, np.uint8)])


def cropped(container: str, **options: object) -> bytes:
    data = encode(
        **{
            "frames": 2,
            "size": (HEIGHT, WIDTH),
            "picture": padded,
            "container": container,
            "options": {"qp": "2"},
            **options,
        }
    )
    right, bottom = WIDTH - LEFT - INNER[1], HEIGHT - TOP - INNER[0]
    if container == "matroska":
        return with_pixel_crop(data, left=LEFT, right=right, top=TOP, bottom=bottom)
    return with_clap(data, INNER[1], INNER[0], Fraction(LEFT - right, 2), Fraction(TOP - bottom, 2))


def quarters(video: Video) -> np.ndarray:
    """Luma of the corners of the first frame as shown."""
    luma = planes(video, [0])[0, 0]
    return np.array([[luma[2, 2], luma[2, -3]], [luma[-3, 2], luma[-3, -3]]])


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_only_the_cropped_window_is_shown(container):
    video = open_video(cropped(container), LIMITS)
    info = video.info
    assert (info.width, info.height, info.coded_width, info.coded_height) == (96, 80, 160, 120)
    assert "cropped:96x80+20+10" in info.warnings
    np.testing.assert_allclose(quarters(video), CORNERS, atol=4)


def test_cropping_applies_before_rotation():
    video = open_video(cropped("mp4", rotation=-90), LIMITS)
    assert (video.info.width, video.info.height, video.info.rotation) == (80, 96, 90)
    np.testing.assert_allclose(quarters(video), np.rot90(CORNERS, -1), atol=4)


def test_sample_aspect_ratio_applies_to_the_cropped_window():
    info = open_video(cropped("mp4", aspect=Fraction(2)), LIMITS).info  # `pasp` is of pixels
    assert (info.width, info.height) == (192, 80)
    plain = encode(1, size=(HEIGHT, WIDTH), codec="ffv1", container="matroska")
    margins = {"left": LEFT, "right": 44, "top": TOP, "bottom": 30}
    data = with_pixel_crop(plain, **margins, display_width=160, display_height=80, display_unit=0)
    info = open_video(data, LIMITS).info  # Matroska's display size is that of the window
    assert (info.width, info.height) == (160, 80)


def test_deinterlacing_applies_before_cropping():
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "qp": "2"}
    video = open_video(cropped("mp4", options=options, frames=4), LIMITS)
    assert {"deinterlaced", "cropped:96x80+20+10"} <= set(video.info.warnings)
    assert planes(video, range(4)).shape == (4, 3, 80, 96)


@pytest.mark.parametrize("codec", ["mjpeg", "png"])
def test_cropping_keeps_range_and_colours(codec):
    full = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}[codec]
    plain = encode(
        [full] * 2, size=(HEIGHT, WIDTH), codec=codec, container="mov", pix_fmt=pix_fmt, source_format="rgb24"
    )
    video = open_video(with_clap(plain, 80, 60), LIMITS)
    assert (video.info.width, video.info.height) == (80, 60)
    np.testing.assert_allclose(planes(video, [1])[0].mean((1, 2)), [235, 128, 128], atol=1)
    assert video.info.color_range == open_video(plain, LIMITS).info.color_range


def test_a_window_between_chroma_samples_is_rounded_as_by_libav():
    data = encode(2, size=(HEIGHT, WIDTH), options=FAST, container="matroska")
    info = open_video(with_pixel_crop(data, left=3, right=2, top=1, bottom=0), LIMITS).info
    assert "cropped:154x118+2+0" in info.warnings
    assert (info.width, info.height) == (154, 118)


@pytest.mark.parametrize(
    "aperture",
    [(400, 80), (-80, 80), (0, 80), (80, 80, 100), (80, 80, 0, -90), (Fraction(1, 3), Fraction(1, 5)), (160, 120)],
    ids=str,
)
def test_an_impossible_aperture_is_ignored(aperture):
    data = with_clap(encode(2, size=(HEIGHT, WIDTH), options=FAST), *aperture)
    video = open_video(data, LIMITS)
    assert (video.info.width, video.info.height) == (WIDTH, HEIGHT)
    assert planes(video, range(2)).shape == (2, 3, HEIGHT, WIDTH)


def test_margins_larger_than_the_frames_are_ignored_with_a_warning():
    plain = encode(
        1, size=(HEIGHT, WIDTH), options=FAST, container="matroska"
    )  # 160 pixels, of which the header says 400
    video = open_video(with_pixel_crop(plain, width=400, left=100, right=80), LIMITS)
    assert (video.info.width, video.info.height) == (WIDTH, HEIGHT)
    assert "bad_crop:100/80/0/0" in video.info.warnings


def test_frames_of_another_size_are_cropped_in_proportion():
    small, large = av.VideoFrame(64, 32, "yuv420p"), av.VideoFrame(128, 64, "yuv420p")
    cropper = Cropper(Margins(32, 0, 16, 16), large)
    cut = [cropper.cut(frame) for frame in (large, small, large)]
    assert [(frame.width, frame.height) for frame in cut] == [(96, 32), (48, 16), (96, 32)]


def test_two_threads_read_the_same_cropping():
    data = cropped("mp4")
    found: list[Margins | None] = []

    def read() -> None:
        for _ in range(20):
            opened = OpenContainer(data, LIMITS)
            found.append(opened.margins())
            opened.close()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {Margins(20, 44, 10, 30)}


@pytest.mark.parametrize("margins", [{"left": 200, "right": 10}, {"top": 60, "bottom": 60}, {"left": 65535}], ids=str)
@pytest.mark.parametrize("as_file", [False, True])
def test_margins_larger_than_the_size_in_the_header_are_ignored_with_a_warning(margins, as_file, tmp_path):
    # libav 8.1 opens no such file.
    data = with_pixel_crop(encode(2, size=(HEIGHT, WIDTH), options=FAST, container="matroska"), **margins)
    (tmp_path / "a.mkv").write_bytes(data)
    video = open_video(str(tmp_path / "a.mkv") if as_file else data, LIMITS)
    assert (video.info.width, video.info.height) == (WIDTH, HEIGHT)
    assert "bad_crop:impossible" in video.info.warnings
    assert planes(video, range(2)).shape == (2, 3, HEIGHT, WIDTH)
    video.close()


MKV = with_pixel_crop(encode(2, size=(HEIGHT, WIDTH), options=FAST, container="matroska"), left=200)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 700), st.binary(max_size=24), st.integers(0, len(MKV)))
def test_patches_of_a_hostile_header_cover_only_crop_elements(position, noise, length):
    header = (MKV[:position] + noise + MKV[position + len(noise) :])[:length]
    for start, patch in impossible_crops(MemoryFile(header)):
        assert 0 <= start < start + len(patch) <= len(header)
        assert header[start : start + 2] in VIDEO_CROPS
        assert patch[0] == 0xEC
        assert patch[1] == 0x80 + len(patch) - 2


MP4 = encode(2, size=(HEIGHT, WIDTH), options=FAST)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=48))
def test_a_hostile_aperture_gives_a_video_or_a_reject(body):
    box = (len(body) + 8).to_bytes(4, "big") + b"clap" + body
    try:
        video = open_video(with_box(MP4, box), LIMITS)
    except BadDataError:
        return
    assert 0 < video.info.width <= WIDTH
    video.close()

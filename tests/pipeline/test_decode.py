"""Decoding: order, times, geometry and jumps of frames, for several codecs and containers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pipeline.errors import PolicyReject
from pipeline.video.decode import Video, open_video
from pipeline.video.decode.planes import Geometry
from tests.pipeline.decoded import FAST, LIMITS, X265, lumas, planes
from tests.video_files import SMALL, encode, luma_of, textured

CODECS = [
    ("libx264", "mp4", "yuv420p", FAST),
    ("libx264", "mp4", "yuv420p", {"bf": "3", "preset": "fast"}),
    ("libx264", "mp4", "yuvj420p", FAST),
    ("libx264", "mp4", "yuv444p", FAST),
    ("libx264", "matroska", "yuv420p10le", FAST),
    ("libx264", "mpegts", "yuv420p", {"bf": "2"}),
    ("libx264", "flv", "yuv420p", FAST),
    ("libx264", "avi", "yuv420p", {"bf": "2", "preset": "fast"}),  # AVI cannot say when reordered frames are shown
    ("libx264", "h264", "yuv420p", {"bf": "2"}),  # no times at all
    ("libx264rgb", "matroska", "rgb24", FAST),
    ("libx265", "mp4", "yuv420p", X265),
    ("libx265", "hevc", "yuv420p10le", X265),
    ("libvpx", "webm", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("libvpx-vp9", "webm", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("libsvtav1", "matroska", "yuv420p", {"preset": "13"}),
    ("libsvtav1", "mp4", "yuv420p10le", {"preset": "13"}),
    ("mpeg4", "avi", "yuv420p", {"bf": "2"}),
    ("mpeg2video", "mpegts", "yuv420p", {"bf": "2"}),
    ("mjpeg", "avi", "yuvj420p", {}),
    ("prores_ks", "mov", "yuv422p10le", {}),
    ("ffv1", "matroska", "gray", {}),
    ("ffv1", "matroska", "yuva420p", {}),
    ("ffv1", "matroska", "yuv444p12le", {}),
    ("rawvideo", "avi", "yuv420p", {}),
    ("rawvideo", "mov", "rgb24", {}),
]


@pytest.mark.parametrize(("codec", "container", "pix_fmt", "options"), CODECS, ids=lambda value: str(value)[:12])
def test_every_frame_of_every_codec_comes_in_order_at_its_level(codec, container, pix_fmt, options):
    data = encode(20, codec=codec, container=container, pix_fmt=pix_fmt, options=options, fps=25)
    video = open_video(data, LIMITS)
    assert (video.info.num_frames, video.info.fps, video.info.width, video.info.height) == (20, 25.0, SMALL, SMALL)
    assert video.info.pixel_format == ("gbrp" if codec == "libx264rgb" else pix_fmt)
    np.testing.assert_allclose(video.times_s, np.arange(20) / 25, atol=0.0005)
    assert video.end_s == pytest.approx(0.8, abs=0.001)
    frames = planes(video, range(20))
    np.testing.assert_allclose(frames[:, 0].mean((1, 2)), [luma_of(i) for i in range(20)], atol=4)  # 13 apart
    np.testing.assert_allclose(frames[:, 1:].mean((2, 3)), 128, atol=1.0)
    assert video.frames_decoded == 20
    video.close()


def test_info_has_codec_sizes_rate_and_hash():
    data = encode(6, size=(48, 80), fps=Fraction(30000, 1001), options=FAST, tags={"colorspace": 1, "color_range": 1})
    info = open_video(data, LIMITS).info
    assert (info.codec, info.width, info.height, info.rotation, info.sample_aspect) == ("h264", 80, 48, 0, (1, 1))
    assert info.fps == pytest.approx(29.97, abs=0.001)
    assert (info.color_matrix, info.color_range, info.warnings) == ("bt709", "limited", ())
    assert len(info.content_hash) == 32
    assert open_video(data, LIMITS).info == info


def test_a_path_gives_the_same_video_as_bytes(tmp_path):
    data = encode(6, options=FAST)
    path = tmp_path / "a:b %d.mp4"  # neither a protocol nor a pattern
    path.write_bytes(data)
    by_path, by_bytes = open_video(str(path), LIMITS), open_video(data, LIMITS)
    assert by_path.info == by_bytes.info
    assert np.array_equal(planes(by_path, range(6)), planes(by_bytes, range(6)))
    by_path.close()


# --- time -------------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_packets_not_of_the_average_rate():
    pts = [0, 1, 2, 10, 11, 20, 30, 31, 32, 33, 60, 61]
    video = open_video(encode(12, options=FAST, pts=pts, time_base=Fraction(1, 100)), LIMITS)
    np.testing.assert_allclose(video.times_s, np.array(pts) / 100)
    assert lumas(encode(12, options=FAST, pts=pts, time_base=Fraction(1, 100))) == [luma_of(i) for i in range(12)]


def test_frames_cut_away_by_an_edit_list_are_not_shown():
    # The mp4 muxer turns negative times into an edit list, so five of twenty frames are decoded and never shown.
    data = encode(20, pts=list(range(-5, 15)), time_base=Fraction(1, 30))
    assert lumas(data) == [luma_of(i) for i in range(5, 20)]


def test_a_late_start_is_time_zero():
    video = open_video(encode(8, pts=list(range(50, 58)), time_base=Fraction(1, 30), options=FAST), LIMITS)
    assert video.times_s[0] == 0
    assert video.end_s == pytest.approx(8 / 30, abs=1e-4)


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "hflip", "shown", "rotation"),
    [
        (0, False, [[9, 1], [1, 1]], 0),
        (-90, False, [[1, 9], [1, 1]], 90),
        (180, False, [[1, 1], [1, 9]], 180),
        (90, False, [[1, 1], [9, 1]], 270),
        (0, True, [[1, 9], [1, 1]], 0),
    ],
)
def test_rotation_and_mirror_are_applied(degrees, hflip, shown, rotation):
    frame = np.full((48 * 3 // 2, 96), 128, np.uint8)
    frame[:48] = 40
    frame[:24, :48] = 200  # the stored picture is bright at its top left
    frame[48:60, :] = 90  # U differs from V
    data = encode([frame] * 3, size=(48, 96), rotation=degrees, hflip=hflip, options={"qp": "1"})
    video = open_video(data, LIMITS)
    info = video.info
    assert (info.rotation, "mirrored" in info.warnings) == (rotation, hflip)
    assert (info.height, info.width) == ((96, 48) if rotation in (90, 270) else (48, 96))
    assert (info.coded_height, info.coded_width) == (48, 96)
    picture = planes(video, [0])[0]
    top, bottom = np.split(picture[0], 2)
    means = [[half.mean() for half in np.split(row, 2, axis=1)] for row in (top, bottom)]
    np.testing.assert_allclose(means, np.where(np.array(shown) == 9, 200, 40), atol=4)
    np.testing.assert_allclose(picture[1:].mean((1, 2)), [90, 128], atol=2)


def test_sample_aspect_ratio_widens_the_picture():
    info = open_video(encode(2, size=(48, 72), aspect=Fraction(4, 3), options=FAST), LIMITS).info
    assert (info.width, info.height, info.sample_aspect, info.coded_width) == (96, 48, (4, 3), 72)


@pytest.mark.parametrize("size", [(51, 67), (35, 64), (64, 33)])
def test_odd_sizes_and_padded_lines_are_decoded(size):
    rgb = np.full((*size, 3), 90, np.uint8)
    rgb[:, : size[1] // 2] = 200
    data = encode([rgb] * 2, size=size, codec="ffv1", container="matroska", pix_fmt="yuv420p", source_format="rgb24")
    video = open_video(data, LIMITS)
    assert (video.info.height, video.info.width) == size
    picture = planes(video, [0])[0]
    expected = [16 + 219 * 200 / 255, 16 + 219 * 90 / 255]
    np.testing.assert_allclose([picture[0, :, :12].mean(), picture[0, :, -12:].mean()], expected, atol=2)


def test_crop_is_a_window_of_the_scaled_picture():
    data = encode(1, size=(96, 128), picture=textured, options=FAST)
    whole = planes(open_video(data, LIMITS), [0], 48, 64)[0]
    out = np.empty((3, 32, 40), np.uint8)
    open_video(data, LIMITS).show(0).write(out, Geometry(48, 64, 7, 11, 32, 40))
    assert np.array_equal(out, whole[:, 7:39, 11:51])


def test_scaling_is_close_to_an_exact_resize():
    # Downscale by two of a smooth picture: nearly the mean of each 2x2 block.
    data = encode(1, size=(128, 192), picture=lambda i, w, h: _smooth(w, h), codec="ffv1", container="matroska")
    video = open_video(data, LIMITS)
    full = _smooth(192, 128)[:128].reshape(64, 2, 96, 2).mean((1, 3))
    difference = planes(video, [0], 64, 96)[0, 0].astype(float) - full
    assert abs(difference[4:-4, 4:-4]).max() < 1.5
    assert abs(difference.mean()) < 0.15


def _smooth(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frame = np.full((height * 3 // 2, width), 128, np.uint8)
    frame[:height] = (128 + 80 * np.sin(x / 23) * np.cos(y / 17)).round()
    return frame


def test_a_change_of_aspect_ratio_is_refused_and_a_change_of_size_is_not():
    def joined(*size: int) -> Video:
        first = encode(10, size=(64, 128), container="mpegts", options=FAST)
        second = encode(
            10, size=size, container="mpegts", options=FAST, pts=list(range(10, 20)), time_base=Fraction(1, 30)
        )
        video = open_video(first + second, LIMITS)
        assert video.info.num_frames == 20
        return video

    smaller = planes(joined(32, 64), range(20))
    assert smaller.shape[2:] == (64, 128)
    np.testing.assert_allclose(smaller[10:14, 0].mean((1, 2)), [luma_of(i) for i in range(4)], atol=4)
    with pytest.raises(PolicyReject, match="change shape from 128x64 to 96x96") as caught:
        planes(joined(96, 96), range(20))
    assert caught.value.reason == "size_changed"


# --- seeking ----------------------------------------------------------------------------------------------------------


SEEKABLE = [
    ("libx264", "mp4", {"preset": "fast", "bf": "3", "g": "12", "threads": "1"}),
    ("libx264", "matroska", {"preset": "fast", "bf": "2", "g": "12", "x264-params": "open-gop=1"}),
    ("libx264", "mpegts", {"preset": "fast", "g": "12"}),
    ("libx265", "mp4", {**X265, "preset": "superfast", "g": "12"}),
    ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    ("libsvtav1", "matroska", {"preset": "12", "g": "12"}),
    ("mjpeg", "avi", {}),
    ("mpeg4", "mp4", {"bf": "2", "g": "12"}),
]


@pytest.mark.parametrize(("codec", "container", "options"), SEEKABLE, ids=lambda value: str(value)[:10])
def test_jumping_ahead_gives_the_pixels_of_a_full_decode(codec, container, options):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = encode(150, codec=codec, container=container, options=options, pix_fmt=pix_fmt, picture=textured)
    straight = open_video(data, LIMITS)
    every = planes(straight, range(150))
    jumping = open_video(data, LIMITS)
    wanted = [0, 1, 40, 41, 63, 110, 111, 112, 149]
    assert np.array_equal(planes(jumping, wanted), every[wanted])
    assert straight.frames_decoded == 150
    if codec != "mpeg4" and options.get("x264-params") != "open-gop=1":  # those two offer no exact start
        assert jumping.frames_decoded < 110


def test_deinterlacing_and_jumping_agree():
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "g": "10"}
    data = encode(100, options=options, picture=textured)
    every = planes(open_video(data, LIMITS), range(100))
    jumping = open_video(data, LIMITS)
    wanted = [3, 50, 51, 99]
    assert np.array_equal(planes(jumping, wanted), every[wanted])
    assert jumping.frames_decoded < 80


def test_reading_stops_after_the_last_wanted_frame():
    video = open_video(encode(120, options=FAST), LIMITS)
    planes(video, range(5))
    assert video.frames_decoded <= 6

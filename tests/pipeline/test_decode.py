"""Decoding: every frame at its time, as shown, in planes; whatever the codec, container, tags and geometry."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.config import DecodeConfig, validate
from pipeline.decode import Video, open_video
from pipeline.errors import BadDataError, DamagedInput, PolicyReject
from pipeline.planes import Geometry
from tests.video_files import SMALL, audio_only, encode, luma_of, textured

FAST = {"preset": "ultrafast"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
LIMITS: DecodeConfig = validate(DecodeConfig, {})
HDR = {"colorspace": 9, "color_trc": 16, "color_primaries": 9}


def limits(**values: object) -> DecodeConfig:
    return validate(DecodeConfig, values)


def planes(video: Video, indices: list[int] | range, height: int = 0, width: int = 0) -> np.ndarray:
    """Frames at `indices`, scaled without a crop to the given size (default: as shown)."""
    height, width = height or video.info.height, width or video.info.width
    geometry = Geometry(height, width, 0, 0, height, width)
    out_T3HW = np.empty((len(indices), 3, height, width), np.uint8)
    for row, shown in enumerate(video.frames(indices)):
        shown.write(out_T3HW[row], geometry)
    return out_T3HW


def lumas(data: bytes, config: DecodeConfig = LIMITS) -> list[int]:
    """Mean luma of each frame: with `numbered` pictures, which frame it is."""
    video = open_video(data, config)
    try:
        return [round(frame[0].mean()) for frame in planes(video, range(video.info.num_frames))]
    finally:
        video.close()


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


def test_info_says_what_the_video_is():
    data = encode(6, size=(48, 80), fps=Fraction(30000, 1001), options=FAST, tags={"colorspace": 1, "color_range": 1})
    info = open_video(data, LIMITS).info
    assert (info.codec, info.width, info.height, info.rotation, info.sample_aspect) == ("h264", 80, 48, 0, (1, 1))
    assert info.fps == pytest.approx(29.97, abs=0.001)
    assert (info.color_matrix, info.color_range, info.warnings) == ("bt709", "limited", ())
    assert len(info.content_hash) == 32
    assert open_video(data, LIMITS).info == info


def test_a_path_gives_what_bytes_give(tmp_path):
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
def test_odd_sizes_and_padded_lines(size):
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
    next(open_video(data, LIMITS).frames([0])).write(out, Geometry(48, 64, 7, 11, 32, 40))
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


def test_a_picture_that_changes_shape_is_refused_and_one_that_only_shrinks_is_not():
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


# --- colour -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "matrix", "warning"),
    [
        (1, "bt709", None),
        (5, "bt601", None),
        (6, "bt601", None),
        (9, "bt2020nc", None),
        (7, "bt709", "color_matrix:smpte240m~bt709"),
        (2, "bt601", "untagged_color:bt601"),
    ],
)
def test_matrix_is_named_from_the_tags(tag, matrix, warning):
    info = open_video(encode(2, options=FAST, tags={"colorspace": tag}), LIMITS).info
    assert info.color_matrix == matrix
    assert (warning in info.warnings) if warning else not info.warnings


def test_untagged_matrix_follows_height_or_the_job():
    small, large = encode(1, options=FAST), encode(1, size=(720, 64), options=FAST)
    assert open_video(small, LIMITS).info.color_matrix == "bt601"
    assert open_video(large, LIMITS).info.color_matrix == "bt709"
    forced = open_video(small, limits(untagged_matrix="bt709")).info
    assert (forced.color_matrix, forced.warnings) == ("bt709", ("untagged_color:bt709",))


def test_a_matrix_we_cannot_undo_is_refused():
    with pytest.raises(PolicyReject, match="colour matrix 8") as caught:
        open_video(encode(1, options=FAST, tags={"colorspace": 8}), LIMITS)
    assert caught.value.reason == "color_matrix"


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p"])
@pytest.mark.parametrize("tagged", [True, False])
def test_full_range_becomes_limited(pix_fmt, tagged):
    # The stored luma is 220 of 255: in limited range 16 + 219 * 220 / 255 = 205.
    frame = np.full((96, 64), 220, np.uint8)
    frame[64:] = 200
    source = av.VideoFrame.from_ndarray(frame, format="yuvj420p")
    source.color_range = 2
    tags = {"color_range": 2} if tagged or pix_fmt == "yuv420p" else {}
    data = encode([source], pix_fmt=pix_fmt, options={"qp": "0"}, tags=tags)
    video = open_video(data, LIMITS)
    assert video.info.color_range == "full"
    means = planes(video, [0])[0].mean((1, 2))
    np.testing.assert_allclose(means, [16 + 219 * 220 / 255, *[128 + 72 * 224 / 255] * 2], atol=1)


def test_rgb_sources_become_bt709():
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[..., 0] = 255
    data = encode([rgb], codec="rawvideo", container="mov", pix_fmt="rgb24", source_format="rgb24")
    video = open_video(data, LIMITS)
    assert video.info.color_matrix == "bt709"
    expected = [16 + 219 * 0.2126, 128 - 224 * 0.2126 / 1.8556, 128 + 224 * 0.5]
    np.testing.assert_allclose(planes(video, [0])[0].mean((1, 2)), expected, atol=1)


def test_hdr_is_refused_or_tone_mapped():
    data = encode(2, codec="libx265", pix_fmt="yuv420p10le", options=X265, tags=HDR)
    with pytest.raises(PolicyReject, match="PQ video") as caught:
        open_video(data, LIMITS)
    assert caught.value.reason == "hdr"
    video = open_video(data, limits(hdr="convert"))
    assert (video.info.color_matrix, "tonemapped" in video.info.warnings) == ("bt709", True)
    luma = planes(video, [0, 1])[:, 0].mean((1, 2))
    assert 16 <= luma[0] < luma[1] < luma_of(1)  # PQ puts most codes into highlights, so SDR shadows are darker


def test_interlaced_is_refused_kept_or_deinterlaced():
    # A bar that moves 6 pixels a field: even lines show it earlier than odd ones, so its edges are combs.
    comb = []
    for index in range(6):
        frame = np.full((96, 64), 128, np.uint8)
        frame[:64] = 40
        for field in (0, 1):
            left = 6 * (2 * index + field)
            frame[field:64:2, left : left + 16] = 200
        comb.append(frame)
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "qp": "2"}
    data = encode(comb, options=options)
    with pytest.raises(PolicyReject) as caught:
        open_video(data, limits(interlaced="reject"))
    assert caught.value.reason == "interlaced"
    kept = open_video(data, limits(interlaced="keep"))
    flat = open_video(data, LIMITS)
    assert "interlaced_kept" in kept.info.warnings
    assert "deinterlaced" in flat.info.warnings
    frames = planes(flat, range(6))
    assert len(frames) == flat.info.num_frames == 6

    def combed(luma_HW: np.ndarray) -> float:
        return float(abs(np.diff(luma_HW[8:-8].astype(int), axis=0)).mean())

    assert combed(planes(kept, range(6))[3, 0]) > 10 * combed(frames[3, 0])


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


# --- refusals ---------------------------------------------------------------------------------------------------------


def reason_of(data: bytes, config: DecodeConfig = LIMITS) -> tuple[type[BadDataError], str]:
    with pytest.raises(BadDataError) as caught:
        lumas(data, config)
    return type(caught.value), caught.value.reason


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 5000,
        b"\0" * 5000,
        json.dumps({"not": "a video"}).encode(),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    ],
    ids=["empty", "garbage", "zeros", "json", "playlist", "concat"],
)
def test_what_is_no_video_is_undecodable(data):
    assert reason_of(data) == (DamagedInput, "undecodable")


def test_a_still_image_is_not_a_video():
    png = encode(1, codec="png", container="image2pipe", pix_fmt="rgb24")
    assert reason_of(png) == (DamagedInput, "undecodable")


def test_sound_alone_has_no_video_stream():
    assert reason_of(audio_only()) == (DamagedInput, "no_video_stream")
    assert len(lumas(encode(4, options=FAST, audio=True))) == 4


def test_an_unknown_codec_has_no_decoder():
    data = encode(4, options=FAST)
    assert data.count(b"avc1") == 2
    assert reason_of(data.replace(b"avc1", b"zzz9")) == (DamagedInput, "no_decoder")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_pixels": SMALL * SMALL - 1}, "too_many_pixels"),
        ({"max_frames": 7}, "too_many_frames"),
        ({"max_duration_s": 0.2}, "too_long"),
        ({"max_video_bytes": 500}, "too_large"),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "h264"])
def test_limits_hold_before_decoding(values, reason, container):
    assert reason_of(encode(8, options=FAST, container=container), limits(**values)) == (PolicyReject, reason)
    assert len(lumas(encode(8, options=FAST, container=container))) == 8


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(DamagedInput) as caught:
        open_video(str(tmp_path / "gone.mp4"), LIMITS)
    assert caught.value.reason == "unreadable"


def test_a_file_cut_off_gives_its_frames_and_then_says_so():
    data = encode(60, picture=textured, options=FAST, container_options={"movflags": "faststart"})
    video = open_video(data[: len(data) * 2 // 3], LIMITS)
    assert "60 frames" in video.incomplete
    assert 30 < video.info.num_frames < 45
    seen = []
    with pytest.raises(DamagedInput) as caught:
        seen.extend(shown.index for shown in video.frames(range(60)))
    assert caught.value.reason == "corrupt_stream"
    assert 30 < caught.value.frames_recovered < 45


def test_without_its_index_a_cut_off_mp4_is_undecodable():
    data = encode(30, picture=textured, options=FAST)
    assert reason_of(data[: len(data) * 2 // 3]) == (DamagedInput, "undecodable")


def test_a_stream_cut_off_in_other_containers_says_that_it_ends_early():
    data = encode(60, picture=textured, options=FAST, container="matroska")
    warnings = open_video(data[: len(data) * 2 // 3], LIMITS).info.warnings
    assert any(warning.startswith("video_ends_early:1.") for warning in warnings)


def test_close_twice():
    video = open_video(encode(2, options=FAST), LIMITS)
    video.close()
    video.close()

"""Colour: matrices by tag, limited range, and the policies for HDR and interlaced video."""

from __future__ import annotations

import av
import numpy as np
import pytest

from pipeline.errors import PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.tonemap import REFERENCE_WHITE, pq_to_light
from tests.odd_inputs import boxes
from tests.odd_inputs.remux import remux
from tests.pipeline.decoded import FAST, HDR, LIMITS, X265, limits, planes
from tests.video_files import encode, luma_of


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
def test_matrix_follows_the_tags(tag, matrix, warning):
    info = open_video(encode(2, options=FAST, tags={"colorspace": tag}), LIMITS).info
    assert info.color_matrix == matrix
    assert (warning in info.warnings) if warning else not info.warnings


def test_untagged_matrix_follows_height_or_the_job():
    small, large = encode(1, options=FAST), encode(1, size=(720, 64), options=FAST)
    assert open_video(small, LIMITS).info.color_matrix == "bt601"
    assert open_video(large, LIMITS).info.color_matrix == "bt709"
    forced = open_video(small, limits(untagged_matrix="bt709")).info
    assert (forced.color_matrix, forced.warnings) == ("bt709", ("untagged_color:bt709",))


def test_an_unsupported_matrix_is_refused():
    with pytest.raises(PolicyReject, match="colour matrix 8") as caught:
        open_video(encode(1, options=FAST, tags={"colorspace": 8}), LIMITS)
    assert caught.value.reason == "color_matrix"


@pytest.mark.parametrize(
    ("codec", "profile", "compatibility", "refused"),
    [
        ("libx265", 5, 0, True),
        ("libx265", 8, 1, False),
        ("libx265", 8, 4, False),
        ("libx265", 7, 6, False),
        ("libsvtav1", 10, 0, True),
        ("libsvtav1", 10, 1, False),
    ],
)
def test_dolby_vision_without_a_compatible_base_layer_is_refused(codec, profile, compatibility, refused):
    options = X265 if codec == "libx265" else {"preset": "13"}
    plain = encode(4, codec=codec, pix_fmt="yuv420p10le", options=options)
    mp4 = boxes.with_dolby_vision(plain, profile, compatibility)
    for data in (mp4, remux(mp4, "matroska")):
        if not refused:
            assert open_video(data, LIMITS).info.num_frames == 4
            continue
        with pytest.raises(PolicyReject, match=f"Dolby Vision profile {profile}") as caught:
            open_video(data, LIMITS)
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
    data = encode(4, codec="libx265", pix_fmt="yuv420p10le", options=X265, tags=HDR)
    with pytest.raises(PolicyReject, match="PQ video") as caught:
        open_video(data, LIMITS)
    assert (caught.value.reason, set(caught.value.video)) == ("hdr", {"px0", "s0", "ms"})
    video = open_video(data, limits(hdr="convert"))
    assert (video.info.color_matrix, "tonemapped" in video.info.warnings) == ("bt709", True)
    signal = (np.array([luma_of(i) for i in range(4)]) - 16) / 219
    expected = 16 + 219 * (pq_to_light(signal) / REFERENCE_WHITE) ** (1 / 2.4)  # all below the knee
    np.testing.assert_allclose(planes(video, range(4))[:, 0].mean((1, 2)), expected, atol=1)


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

"""Colour: matrices by tag, limited range, and the policies for HDR and interlaced video."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("tag", [0, 1, 2])
@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le"])
def test_grey_is_full_range_whatever_the_tag(pix_fmt, tag):
    """libav's scaler knows no limited grey."""
    bits = 10 if "10" in pix_fmt else 8
    frame = np.full((64, 64), 220 << bits - 8, np.uint16 if bits > 8 else np.uint8)
    tags = {"color_range": tag}
    data = encode([frame], codec="ffv1", container="matroska", pix_fmt=pix_fmt, source_format=pix_fmt, tags=tags)
    video = open_video(data, LIMITS)
    assert video.info.color_range == ("untagged", "limited", "full")[tag]
    np.testing.assert_allclose(planes(video, [0])[0].mean((1, 2)), [16 + 219 * 220 / 255, 128, 128], atol=1)


def test_rgb_sources_become_bt709():
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[..., 0] = 255
    data = encode([rgb], codec="rawvideo", container="mov", pix_fmt="rgb24", source_format="rgb24")
    video = open_video(data, LIMITS)
    assert video.info.color_matrix == "bt709"
    expected = [16 + 219 * 0.2126, 128 - 224 * 0.2126 / 1.8556, 128 + 224 * 0.5]
    np.testing.assert_allclose(planes(video, [0])[0].mean((1, 2)), expected, atol=1)


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt", "opaque_format"),
    [
        ("qtrle", "mov", "argb", "rgb24"),
        ("png", "mov", "rgba", "rgb24"),
        ("png", "mov", "ya8", "gray"),
        ("apng", "apng", "rgba", "rgb24"),
        ("prores_ks", "mov", "yuva444p10le", "yuv422p10le"),
        ("ffv1", "matroska", "yuva420p", "yuv420p"),
        ("libvpx-vp9", "webm", "yuva420p", "yuv420p"),
    ],
)
def test_transparency_of_a_video_is_ignored_with_a_warning(codec, container, pix_fmt, opaque_format):
    rgba_HW4 = np.full((64, 64, 4), (200, 40, 60, 255), np.uint8)
    rgba_HW4[:32, :, 3] = 0
    found = {}
    for format_ in (pix_fmt, opaque_format):
        data = encode([rgba_HW4] * 3, codec=codec, container=container, pix_fmt=format_, source_format="rgba")
        found[format_] = "alpha:ignored" in open_video(data, LIMITS).info.warnings
    assert found == {pix_fmt: True, opaque_format: False}


def test_of_a_gif_the_first_frame_shows_whether_it_has_transparency():
    """libav gives an alpha channel to all of them."""
    for transparent in (True, False):
        pictures = [Image.fromarray(np.full((64, 50, 4), (9, 9, 40 * n, 255), np.uint8)) for n in range(3)]
        if transparent:
            pictures[0].putpixel((49, 63), (0, 0, 0, 0))
        target = io.BytesIO()
        pictures[0].save(target, "GIF", save_all=True, append_images=pictures[1:])
        video = open_video(target.getvalue(), LIMITS)
        assert (video.info.pixel_format, "alpha:ignored" in video.info.warnings) == ("bgra", transparent)


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

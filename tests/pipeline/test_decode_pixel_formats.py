"""One colour in every pixel format that libav can scale: the planes have it, by the matrix in the video's properties."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.video.format import names as pixel_formats
from av.video.frame import supported_np_pix_fmts
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from pipeline.errors import PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.colour_tags import resolve, rgb_matrix
from pipeline.video.decode.orientation import Orientation
from pipeline.video.decode.planes import Geometry, Scaler
from pipeline.video.decode.tonemap import REFERENCE_WHITE, TO_709, light_to_pq
from tests.pipeline.decoded import FAST, LIMITS, limits, planes
from tests.video_files import encode

SIDE = 32
RED = (220, 20, 20)
RED_AS_GREY = 80  # by BT.601, which swscale uses for grey
RED_AS_DOTS = 74  # in ordered black and white dots
KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
NOT_READ = {"bgr4", "rgb4"}  # swscale writes these and does not read them


def to_rgb(planes_3HW: np.ndarray, matrix: str) -> np.ndarray:
    """Mean R, G, B in 0..255 of limited-range planes."""
    y, cb, cr = (planes_3HW.reshape(3, -1).mean(1) - [16, 128, 128]) / [219, 224, 224]
    kr, kb = KR_KB[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return 255 * np.array([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue])


def through(frame: av.VideoFrame) -> np.ndarray:
    """R, G, B of a frame, as a reader of our planes sees it."""
    rgb = rgb_matrix(frame.format)
    colour = resolve(frame.colorspace, frame.color_range, 2, frame.height, rgb, "auto")
    out_3HW = np.empty((3, SIDE, SIDE), np.uint8)
    Scaler(Orientation(), "sdr").write(frame, Geometry(SIDE, SIDE, 0, 0, SIDE, SIDE), out_3HW)
    return to_rgb(out_3HW, colour.matrix)


def is_grey(name: str) -> bool:
    return name.startswith(("gray", "ya", "mono"))


def test_every_format_that_libav_scales_keeps_the_colour():
    red = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), RED, np.uint8), format="rgb24")
    tried = set()
    for name in sorted(pixel_formats - NOT_READ):
        for colorspace, tag in ((Colorspace.ITU601, 6), (Colorspace.ITU709, 1), (Colorspace.ITU601, 2)):
            for color_range in (ColorRange.MPEG, ColorRange.JPEG):
                try:
                    frame = VideoReformatter().reformat(
                        red, SIDE, SIDE, name, dst_colorspace=colorspace, dst_color_range=color_range
                    )
                except (av.error.FFmpegError, ValueError):
                    continue  # not a format that swscale writes
                frame.colorspace = tag
                expected = (RED_AS_DOTS if name.startswith("mono") else RED_AS_GREY,) * 3 if is_grey(name) else RED
                np.testing.assert_allclose(
                    through(frame), expected, atol=5, err_msg=f"{name} {colorspace} {color_range}"
                )
                tried.add(name)
    assert len(tried) > 190  # 200 of 267 with libav 8.1; the others hold no pixels or are read only
    assert {
        "yuv420p",
        "yuvj422p",
        "yuva444p",
        "nv12",
        "p010le",
        "gbrp",
        "gbrap",
        "rgba",
        "gray",
        "gray16le",
        "ya8",
    } <= tried
    assert {"monob", "monow", "xyz12le", "rgb565le", "rgb8", "y210le", "gbrpf32le", "uyvy422"} <= tried


@pytest.mark.parametrize("name", sorted(n for n in supported_np_pix_fmts if n.startswith(("bayer", "rgbaf16"))))
def test_formats_that_libav_only_reads_keep_the_colour(name):
    deep = "16" in name
    peak = 1 if "f16" in name else 65535 if deep else 255
    values = np.array(RED) / 255 * peak
    if name.startswith("bayer"):
        tile = [values["rgb".index(letter)] for letter in name.split("_")[1][:4]]
        array = np.tile(np.array(tile).reshape(2, 2), (SIDE // 2, SIDE // 2)).astype(np.uint16 if deep else np.uint8)
    else:
        array = np.full((SIDE, SIDE, 4), (*values, 1), np.float16)
    frame = av.VideoFrame.from_ndarray(array, format=name)
    np.testing.assert_allclose(through(frame), RED, atol=5)


def test_a_format_that_libav_cannot_scale_is_refused_with_its_name():
    red = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), RED, np.uint8), format="rgb24")
    with pytest.raises(PolicyReject, match="pixel format rgb4") as caught:
        through(VideoReformatter().reformat(red, SIDE, SIDE, "rgb4"))
    assert caught.value.reason == "pixel_format"


PALETTES = [
    *(("zmbv", "avi"), ("png", "mov"), ("png", "avi"), ("smc", "mov"), ("msrle", "avi")),
    *(("targa", "mov"), ("tiff", "mov"), ("gif", "gif"), ("apng", "apng")),
]


@pytest.mark.parametrize(("codec", "container"), PALETTES)
@pytest.mark.parametrize("height", [64, 720])  # the guess for untagged video changes at 720 lines
def test_palettes_keep_their_colours(codec, container, height):
    indices = np.zeros((height, 64), np.uint8)
    indices[: height // 2] = 1
    palette = np.zeros((256, 4), np.uint8)
    palette[:2] = (255, 30, 60, 200), (255, *RED)  # ARGB

    pictures = [av.VideoFrame.from_ndarray((indices.copy(), palette), format="pal8") for _ in range(2)]
    data = encode(pictures, size=(height, 64), codec=codec, container=container, pix_fmt="pal8")
    video = open_video(data, LIMITS)
    corner_3HW = planes(video, [1])[0, :, :8, :8]
    np.testing.assert_allclose(to_rgb(corner_3HW, video.info.color_matrix), RED, atol=3)
    assert not any(warning.startswith("untagged_color") for warning in video.info.warnings)


@pytest.mark.parametrize("pix_fmt", ["gbrp", "rgb24"])
def test_rgb_keeps_its_colour(pix_fmt):
    picture = np.full((64, 64, 3), RED, np.uint8)
    codec = {"gbrp": "libx264rgb", "rgb24": "png"}[pix_fmt]
    stored = {"gbrp": "bgr24"}.get(pix_fmt, pix_fmt)
    options = {**FAST, "qp": "0"} if codec == "libx264rgb" else {}
    data = encode([picture], codec=codec, container="mov", pix_fmt=stored, source_format="rgb24", options=options)
    video = open_video(data, LIMITS)
    assert video.info.pixel_format == pix_fmt
    np.testing.assert_allclose(to_rgb(planes(video, [0])[0], video.info.color_matrix), RED, atol=3)


def test_hdr_in_rgb_keeps_its_colour():
    light = np.array([1 / 8, 1 / 48, 1 / 32])  # of reference white, below the knee of the tone curve
    picture = np.full((64, 64, 3), 65535 * light_to_pq(np.float32(REFERENCE_WHITE) * light), np.uint16)
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(format="gbrp10le")]
    tags = {"color_trc": 16, "color_primaries": 9, "colorspace": 0}
    data = encode(frames, codec="ffv1", container="matroska", pix_fmt="gbrp10le", tags=tags)
    video = open_video(data, limits(hdr="convert"))
    expected = 255 * (TO_709 @ light) ** (1 / 2.4)
    np.testing.assert_allclose(to_rgb(planes(video, [0])[0], video.info.color_matrix), expected, atol=2)

"""Comparison with libav: the frames, their number and their times are those of its decode of the whole stream, for every container and
codec that can be written here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.errors import BadDataError
from tests.odd_inputs.cutting import read_through
from tests.odd_inputs.numbered import (
    MPEG,
    VP8,
    VP9,
    X264,
    X264_B,
    X265,
    decode_with_libav,
    encode,
    number_in,
    number_of,
)
from tests.odd_inputs.untimed import irregular_times

FRAMES = 30
RATE = Fraction(24)
TICK_S = 0.0011  # times are rounded to milliseconds in some containers
MPEG_B = {**MPEG, "bf": "2", "g": "12"}

# Encoder, options, pixel format, frame size (height, width). Those with "b" reorder frames.
CODECS: dict[str, tuple[str, dict[str, str], str, tuple[int, int]]] = {
    "h264": ("libx264", X264, "yuv420p", (64, 96)),
    "h264-b": ("libx264", X264_B, "yuv420p", (64, 96)),
    "hevc-b": ("libx265", X265, "yuv420p", (64, 96)),
    "vp8": ("libvpx", VP8, "yuv420p", (64, 96)),
    "vp9": ("libvpx-vp9", VP9, "yuv420p", (64, 96)),
    "av1": ("libsvtav1", {"preset": "13", "crf": "20", "svtav1-params": "lp=1"}, "yuv420p", (64, 96)),
    "mpeg1-b": ("mpeg1video", MPEG_B, "yuv420p", (64, 96)),
    "mpeg2": ("mpeg2video", MPEG, "yuv420p", (64, 96)),
    "mpeg2-b": ("mpeg2video", MPEG_B, "yuv420p", (64, 96)),
    "mpeg4": ("mpeg4", MPEG, "yuv420p", (64, 96)),
    "mpeg4-b": ("mpeg4", MPEG_B, "yuv420p", (64, 96)),
    "msmpeg4": ("msmpeg4", MPEG, "yuv420p", (64, 96)),
    "wmv1": ("wmv1", MPEG, "yuv420p", (64, 96)),
    "wmv2": ("wmv2", MPEG, "yuv420p", (64, 96)),
    "flv1": ("flv", MPEG, "yuv420p", (64, 96)),
    "h263": ("h263", MPEG, "yuv420p", (144, 176)),
    "rv20": ("rv20", MPEG, "yuv420p", (64, 96)),
    "svq1": ("svq1", {}, "yuv410p", (64, 96)),
    "cinepak": ("cinepak", {}, "rgb24", (64, 96)),
    "mjpeg": ("mjpeg", {}, "yuvj420p", (64, 96)),
    "ffv1": ("ffv1", {}, "yuv420p", (64, 96)),
    "huffyuv": ("huffyuv", {}, "yuv422p", (64, 96)),
    "utvideo": ("utvideo", {}, "yuv420p", (64, 96)),
    "magicyuv": ("magicyuv", {}, "yuv444p", (64, 96)),
    "png": ("png", {}, "rgb24", (64, 96)),
    "qtrle": ("qtrle", {}, "rgb24", (64, 96)),
    "prores": ("prores_ks", {}, "yuv422p10le", (64, 96)),
    "jpeg2000": ("jpeg2000", {}, "yuv420p", (64, 96)),
    "cfhd": ("cfhd", {}, "yuv422p10le", (64, 96)),
    "raw": ("rawvideo", {}, "yuv420p", (64, 96)),
    "gif": ("gif", {}, "rgb8", (64, 96)),
    "apng": ("apng", {}, "rgb24", (64, 96)),
}
# Muxers whose output Lathe's list of demuxers reads, each with how many of the codecs above it carries: libav gets back what went in.
CONTAINERS = {
    "mp4": 14, "mov": 20, "matroska": 17, "webm": 3, "avi": 26, "mpegts": 7, "mpeg": 7, "vob": 7, "flv": 6, "asf": 26, "nut": 28,
    "mxf": 7, "ogg": 1, "ivf": 3, "obu": 1, "3gp": 5, "f4v": 2, "ismv": 12, "ipod": 4, "wtv": 20, "rm": 1, "gif": 1, "apng": 1,
    "h264": 2, "hevc": 1, "m4v": 2, "h263": 1, "mpeg1video": 1, "mpeg2video": 2, "mjpeg": 1, "yuv4mpegpipe": 1,
}  # fmt: skip
PRIVATE = {"mpegts", "mpeg", "vob"}  # they take any codec, and name only these
NAMED_IN_MPEG = {"h264", "h264-b", "hevc-b", "mpeg1-b", "mpeg2", "mpeg2-b", "mpeg4", "mpeg4-b"}
VARIABLE = (
    "mp4",
    "mov",
    "matroska",
    "nut",
    "flv",
    "mpegts",
)  # ASF keeps one time per frame, and libav takes it for that of decoding


def encoded(container: str, codec: str, **settings) -> bytes | None:
    """A numbered video; None if the container does not take the codec."""
    encoder, options, pix_fmt, size = CODECS[codec]
    if container in PRIVATE and codec not in NAMED_IN_MPEG:
        return None
    try:
        return encode(
            range(FRAMES), container, encoder, options=options, pix_fmt=pix_fmt, size=size, fps=RATE, **settings
        )
    except (av.error.FFmpegError, ValueError):
        return None


def libav_times(frames: list[av.VideoFrame], container: str, reordered: bool) -> list[float] | None:
    """Seconds from the first frame. At the rate where libav knows no times, or guesses (AVI has none for reordered frames); None where its
    times do not ascend.
    """
    times = [None if frame.pts is None else float(frame.pts * frame.time_base) for frame in frames]
    if None in times or (container == "avi" and reordered):
        return [n / float(RATE) for n in range(len(frames))]
    ascending = all(later > earlier for earlier, later in itertools.pairwise(times))
    return [time - times[0] for time in times] if ascending else None


def decoded_by_libav(data: bytes) -> list[av.VideoFrame]:
    """All frames; none if libav cannot read the file it wrote."""
    try:
        frames = decode_with_libav(data)
    except (av.error.FFmpegError, IndexError):  # IndexError: no stream
        return []
    return frames if [number_in(frame) for frame in frames] == list(range(FRAMES)) else []


def differences(data: bytes, frames: list[av.VideoFrame], container: str, codec: str) -> Iterator[str]:
    """Differences between the frames of Lathe and those of libav."""
    try:
        found = read_through(data)
    except BadDataError as error:
        yield f"is refused: {error}"
        return
    if found.error is not None:
        yield f"fails: {found.error}"
        return
    shown = [number_of(planes) for planes in found.planes]
    if shown != list(range(FRAMES)):
        yield f"shows {shown}"
        return
    times = libav_times(frames, container, codec.endswith("-b"))
    if times is not None and (worst := np.abs(found.times_s - times).max()) > TICK_S:
        yield f"times differ by up to {worst:.4f} s: {found.times_s[:6]} and {times[:6]}"


@pytest.mark.parametrize("container", CONTAINERS)
def test_frames_and_times_of_every_codec_and_container_are_those_of_libav(container):
    wrong, compared = {}, []
    for codec in CODECS:
        data = encoded(container, codec)
        if data is None or not (frames := decoded_by_libav(data)):
            continue
        compared.append(codec)
        if found := list(differences(data, frames, container, codec)):
            wrong[codec] = found
    assert not wrong
    assert len(compared) >= CONTAINERS[container], compared


@pytest.mark.parametrize("container", VARIABLE)
def test_a_variable_rate_is_kept(container):
    times = irregular_times(FRAMES)
    compared = 0
    for codec in ("h264", "h264-b", "hevc-b", "mpeg4-b", "vp9", "mjpeg"):
        data = encoded(container, codec, pts=times, time_base=Fraction(1, 1000))
        if data is None or not (frames := decoded_by_libav(data)):
            continue
        assert not list(differences(data, frames, container, codec)), codec
        expected = [(time - times[0]) / 1000 for time in times]
        np.testing.assert_allclose(read_through(data).times_s, expected, atol=2 * TICK_S)
        compared += 1
    assert compared

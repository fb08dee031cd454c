"""Containers with several video streams: the moving one is decoded, and a warning counts the others."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipeline.errors import PolicyReject
from pipeline.video.decode import open_video
from tests.pipeline.decoded import FAST, LIMITS, lumas
from tests.video_files import SMALL, luma_of, numbered

SIDE = 32  # of pictures that are not the video


def joined(
    container: str, *streams: tuple[str, int, int], disposition: Disposition | None = None, sound_s: float = 0
) -> bytes:
    """A file of (codec, frames, side) streams, in that order, at 30 fps. `disposition` is the first one's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        opened = []
        for codec, count, side in streams:
            pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
            options = FAST if codec == "libx264" else {}
            stream = output.add_stream(codec, rate=30, width=side, height=side, options=options)
            stream.pix_fmt = pix_fmt
            opened.append((stream, count, side))
        if disposition is not None:
            opened[0][0].disposition = disposition
        sound = output.add_stream("aac", rate=48000) if sound_s else None
        output.start_encoding()
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, int(48000 * sound_s) * 2), np.int16), "s16", "stereo")
            silence.sample_rate = 48000
            packets = [*sound.encode(silence), *sound.encode()]
            for packet in packets:
                output.mux(packet)
        for index in range(max(count for _, count, _ in opened)):
            for stream, count, side in opened:
                if index < count:
                    frame = av.VideoFrame.from_ndarray(numbered(index, side, side), format="yuv420p")
                    frame.pts = index
                    output.mux(stream.encode(frame))
        for stream, _, _ in opened:
            output.mux(stream.encode())
    return buffer.getvalue()


VIDEO = ("libx264", 12, SMALL)


@pytest.mark.parametrize(
    ("container", "cover"),
    [("mp4", "mjpeg"), ("mp4", "libx264"), ("mov", "png"), ("matroska", "mjpeg"), ("avi", "mjpeg")],
)
def test_a_single_picture_before_the_video_is_not_taken(container, cover):
    data = joined(container, (cover, 1, SIDE), VIDEO, disposition=Disposition.default)
    info = open_video(data, LIMITS).info
    assert (info.width, info.num_frames) == (SMALL, 12)
    assert not [warning for warning in info.warnings if warning.startswith("extra_streams")]
    assert lumas(data) == pytest.approx([luma_of(i) for i in range(12)], abs=1)


def test_a_motion_jpeg_is_preferred_to_a_still_of_another_codec():
    info = open_video(joined("mov", ("libx264", 1, SIDE), ("mjpeg", 9, SMALL)), LIMITS).info
    assert (info.codec, info.num_frames) == ("mjpeg", 9)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_of_two_videos_libavs_best_is_taken_with_a_warning(container):
    data = joined(container, ("libx264", 12, SIDE), VIDEO)
    with av.open(io.BytesIO(data)) as opened:
        best = opened.streams.best("video")
    info = open_video(data, LIMITS).info
    assert info.width == best.width
    assert "extra_streams:1" in info.warnings


def test_an_enabled_track_is_preferred_to_a_disabled_one():
    data = bytearray(joined("mp4", ("libx264", 12, SIDE), VIDEO))
    flags = data.index(b"tkhd") + 7
    data[flags] &= ~1  # not enabled
    info = open_video(bytes(data), LIMITS).info
    assert info.width == SMALL
    assert "extra_streams:1" in info.warnings


def test_flagged_cover_art_is_never_the_video():
    data = joined("mp4", ("mjpeg", 1, SIDE), VIDEO, disposition=Disposition.attached_pic)
    assert open_video(data, LIMITS).info.warnings == ("untagged_color:bt601",)
    with pytest.raises(PolicyReject, match="only cover art") as caught:
        open_video(joined("mp4", ("mjpeg", 1, SIDE), disposition=Disposition.attached_pic), LIMITS)
    assert caught.value.reason == "no_video_stream"


def test_the_moving_stream_is_found_behind_sound():
    data = joined("nut", ("mjpeg", 1, SIDE), VIDEO, sound_s=3)
    assert open_video(data, LIMITS).info.width == SMALL


def test_a_file_with_only_stills_gives_one_of_them():
    info = open_video(joined("mov", ("mjpeg", 1, SIDE), ("mjpeg", 1, SMALL)), LIMITS).info
    assert info.num_frames == 1

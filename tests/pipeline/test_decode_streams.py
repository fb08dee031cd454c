"""Containers with several video streams: the moving one is decoded, and a warning counts the others."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipeline.errors import PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.stream_choice import LOOK_ALL_PACKETS
from tests.pipeline.decoded import FAST, LIMITS, limits, lumas
from tests.video_files import SMALL, encode, luma_of, numbered

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


# --- tracks in turns --------------------------------------------------------------------------------------------------


def in_turns(container: str, frames: int, turn: int) -> bytes:
    """Two tracks at 30 fps, the first one large and the default: `turn` frames of the second, as many of the first, and so on."""
    sides, packets = (SMALL, SIDE), []
    buffer = io.BytesIO()
    options = {"max_interleave_delta": "1"}
    with av.open(buffer, "w", format=container, container_options=options) as output:
        streams = [output.add_stream("libx264", rate=30, width=side, height=side, options=FAST) for side in sides]
        streams[0].disposition, streams[1].disposition = Disposition.default, Disposition(0)
        for stream, side in zip(streams, sides, strict=True):
            own = []
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(numbered(index, side, side), format="yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 30)
                own += stream.encode(frame)
            packets.append([*own, *stream.encode()])
        for at in range(0, frames, turn):
            for own in reversed(packets):
                for packet in own[at : at + turn]:
                    output.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("turn", [15, 30, 60])
def test_of_tracks_in_turns_libavs_best_is_taken_even_if_stored_second(container, turn):
    data = in_turns(container, 60, turn)
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.best("video").index == 0
    info = open_video(data, LIMITS).info
    assert (info.width, info.num_frames) == (SMALL, 60)
    assert info.warnings[0] == "extra_streams:1"


def test_a_track_that_begins_behind_the_look_is_warned_of():
    data = in_turns("matroska", LOOK_ALL_PACKETS + 10, LOOK_ALL_PACKETS + 10)
    assert open_video(data, limits(max_frames=10_000)).info.warnings[0] == "extra_streams:1"


@pytest.mark.parametrize("seconds", [2, 16])  # libav looks 5 s ahead when it opens a transport stream
def test_a_video_pid_that_changes_is_warned_of(seconds):
    def segment(pid: int) -> bytes:
        options = {"mpegts_start_pid": str(pid)}
        return encode(30 * seconds, container="mpegts", options=FAST, container_options=options)

    info = open_video(segment(256) + segment(300), LIMITS).info
    assert (info.num_frames, info.warnings[0]) == (30 * seconds, "extra_streams:1")
    assert "extra_streams:1" not in open_video(segment(256) + segment(256), LIMITS).info.warnings

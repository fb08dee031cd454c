"""Rejects of undecodable files, of files beyond a limit and of truncated files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.errors import BadDataError, DamagedInput, PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.frame_stream import FrameStream
from pipeline.video.decode.planes import Geometry, Scaler
from tests.odd_inputs import boxes, clocks
from tests.odd_inputs.cutting import cut as clips_of
from tests.odd_inputs.cutting import rules
from tests.pipeline.decoded import FAST, LIMITS, limits, lumas
from tests.video_files import SMALL, encode, textured


def reason_of(data: bytes, config: DecodeConfig = LIMITS) -> tuple[type[BadDataError], str]:
    with pytest.raises(BadDataError) as caught:
        lumas(data, config)
    return type(caught.value), caught.value.reason


@pytest.mark.parametrize("data", [b"x" * 5000, bytes(range(256)) * 20], ids=["letters", "bytes"])
def test_bytes_of_an_unknown_format_are_undecodable(data):
    assert reason_of(data) == (DamagedInput, "undecodable")


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


def test_what_is_known_of_a_refused_video_is_counted():
    data = encode(8, options=FAST)
    for values, names in (
        ({"max_pixels": SMALL * SMALL - 1}, {"px0"}),
        ({"max_frames": 7}, {"px0"}),
        ({"max_duration_s": 0.2}, {"px0", "s0", "ms"}),
        ({"max_video_bytes": 500}, set()),
    ):
        with pytest.raises(PolicyReject) as caught:
            open_video(data, limits(**values))
        assert set(pickle.loads(pickle.dumps(caught.value)).video) == names  # noqa: S301


def test_a_truncated_file_gives_its_frames_and_is_reported():
    data = encode(60, picture=textured, options=FAST, container_options={"movflags": "faststart"})
    video = open_video(data[: len(data) * 2 // 3], LIMITS)
    assert "60 frames" in video.incomplete
    assert 30 < video.info.num_frames < 45
    seen = []
    with pytest.raises(DamagedInput) as caught:
        seen.extend(shown.index for shown in map(video.show, range(60)))
    assert caught.value.reason == "corrupt_stream"
    assert 30 < caught.value.frames_recovered < 45


@pytest.mark.parametrize(
    "make", [clocks.two_edits, clocks.edit_inside_group, clocks.empty_edit, clocks.rewound, clocks.repeated]
)
def test_a_file_cut_by_an_edit_list_is_complete(make):
    assert open_video(make(), LIMITS).incomplete == ""
    clips = clips_of(make(), rules("whole"))
    assert (len(clips.opened.clips), clips.opened.rejects) == (1, ())


def test_a_sample_without_bytes_is_not_a_missing_frame():
    data = encode(24, codec="mjpeg", container="mov", pix_fmt="yuvj420p", picture=textured)
    video = open_video(boxes.with_empty_sample(data, 12), LIMITS)
    assert (video.info.num_frames, video.incomplete) == (23, "")


def test_frames_of_a_second_codec_are_reported():
    data = boxes.with_two_codecs(encode(60, picture=textured, options=FAST), 30)
    video = open_video(data, LIMITS)
    assert video.info.num_frames == 30
    assert "60 frames, of which libav reads 30" in video.incomplete


def test_a_fragment_that_is_cut_is_reported():
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    data = encode(60, picture=textured, options={**FAST, "g": "24"}, container_options=fragmented)
    assert open_video(data, LIMITS).incomplete == ""
    assert "48 frames, it holds" in open_video(data[: len(data) * 7 // 10], LIMITS).incomplete


def test_a_truncated_mp4_without_its_index_is_undecodable():
    data = encode(30, picture=textured, options=FAST)
    assert reason_of(data[: len(data) * 2 // 3]) == (DamagedInput, "undecodable")


def test_a_truncated_stream_in_other_containers_has_a_warning():
    data = encode(60, picture=textured, options=FAST, container="matroska")
    warnings = open_video(data[: len(data) * 2 // 3], LIMITS).info.warnings
    assert any(warning.startswith("video_ends_early:1.") for warning in warnings)


@pytest.mark.parametrize(
    "error", [ValueError("31 is not a valid Type"), ZeroDivisionError("division by zero"), KeyError("x"), MemoryError()]
)
def test_only_named_errors_leave_the_decoder(monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    reason = "decoder_memory" if isinstance(error, MemoryError) else "decoder_fault"
    video = open_video(encode(4, options=FAST), LIMITS)
    with monkeypatch.context() as patched:
        patched.setattr(FrameStream, "next", failing)
        for call in (lambda: open_video(encode(4, options=FAST), LIMITS), lambda: list(map(video.show, [0, 3]))):
            with pytest.raises(DamagedInput) as caught:
                call()
            assert caught.value.reason == reason
    shown = open_video(encode(4, options=FAST), LIMITS).show(0)
    monkeypatch.setattr(Scaler, "write", failing)
    with pytest.raises(DamagedInput) as caught:
        shown.write(np.empty((3, 32, 32), np.uint8), Geometry(32, 32, 0, 0, 32, 32))
    assert caught.value.reason == reason


def test_close_may_be_called_twice():
    video = open_video(encode(2, options=FAST), LIMITS)
    video.close()
    video.close()


def test_the_reject_of_an_mp4_without_index_says_so():
    data = encode(12, options=FAST)
    for cut, words in ((-4, "no index"), (40, "")):
        with pytest.raises(DamagedInput, match=words or "header is cut|Invalid data") as caught:
            open_video(data[: data.index(b"moov") + cut], LIMITS)
        assert caught.value.reason == "undecodable"

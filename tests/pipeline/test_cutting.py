"""Cutting: frames and lengths of chunks, independent of chunk length and other clips; failures end every clip."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.errors import DamagedInput, TransientError
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Sample, TimeSpan, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode.frame_stream import FrameStream
from tests.video_files import encode, textured, write

FAST = {"preset": "ultrafast"}
Answer = FrameChunk | ClipFailed


def request_of(
    data: bytes | str, *, chunk_frames: int = 8, drill: dict[str, object] | None = None, **clips: object
) -> CutRequest:
    rules = resolve_rules(validate(ClipConfig, {"size": "48x48", **clips}), 4, 8, "leanvae")
    sample = Sample("key", 3, "s3://bucket/a.tar", data, "mp4", caption="words")
    return CutRequest(sample, rules, validate(DecodeConfig, {}), chunk_frames, validate(DrillConfig, drill or {}))


def cut(request: CutRequest) -> tuple[OpenedVideo, list[Answer], VideoEnded]:
    cutter = Cutter(request)
    opened = cutter.open()
    answers: list[Answer] = []
    while not isinstance(answer := cutter.next(), VideoEnded):
        answers.append(answer)
    return opened, answers, answer


def by_clip(answers: list[Answer]) -> dict[int, list[FrameChunk]]:
    found: dict[int, list[FrameChunk]] = {}
    for answer in answers:
        assert isinstance(answer, FrameChunk)
        found.setdefault(answer.clip, []).append(answer)
    return found


def planes_of(chunks: list[FrameChunk]) -> np.ndarray:
    return np.concatenate([chunk.planes_T3HW for chunk in chunks])


def frames_of(chunks: list[FrameChunk]) -> list[int]:
    """Number of the picture (of 16 recognisable ones) of each frame."""
    return [round((frame[0].mean() - 24) / 13) for frame in planes_of(chunks)]


@pytest.fixture(scope="module")
def numbers() -> bytes:
    return encode(100, options={"preset": "fast", "g": "10"}, fps=25)


@pytest.fixture(scope="module")
def texture() -> bytes:
    return encode(100, size=(64, 96), options={"preset": "fast", "g": "10"}, fps=25, picture=textured)


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_frames", "lengths"),
    [(8, [9, 8, 8, 8]), (10, [9, 8, 8, 8]), (12, [13, 12, 8]), (4, [5] + [4] * 7), (64, [33]), (0, [33])],
)
def test_first_chunk_has_one_frame_more(numbers, chunk_frames, lengths):
    _, answers, _ = cut(request_of(numbers, chunk_frames=chunk_frames, frames=33))
    chunks = by_clip(answers)[0]
    assert [len(chunk.planes_T3HW) for chunk in chunks] == lengths
    assert [chunk.first for chunk in chunks] == [True] + [False] * (len(lengths) - 1)
    assert [chunk.last for chunk in chunks] == [False] * (len(lengths) - 1) + [True]
    assert all(chunk.planes_T3HW.flags.c_contiguous and chunk.planes_T3HW.flags.owndata for chunk in chunks)
    assert frames_of(chunks) == [i % 16 for i in range(33)]


def test_without_a_lead_frame_all_chunks_have_one_length(numbers):
    request = request_of(numbers, frames=17, chunk_frames=8)
    rules = resolve_rules(validate(ClipConfig, {"size": "48x48", "frames": 16}), 4, 8, "net", lead_frames=0)
    _, answers, _ = cut(dataclasses.replace(request, rules=rules))
    assert [chunk.planes_T3HW.shape[0] for chunk in by_clip(answers)[0]] == [8, 8]


def test_chunking_changes_no_pixel(texture):
    whole = planes_of(by_clip(cut(request_of(texture, chunk_frames=0, frames=49))[1])[0])
    for chunk_frames in (4, 16):
        assert np.array_equal(
            planes_of(by_clip(cut(request_of(texture, chunk_frames=chunk_frames, frames=49))[1])[0]), whole
        )


def test_head_decodes_only_the_frames_it_needs(numbers):
    _, _, ended = cut(request_of(numbers, frames=17))
    assert ended.frames_decoded < 25
    assert ended.decode_s > 0


# --- modes ------------------------------------------------------------------------------------------------------------


def test_tile_gives_every_frame_once_and_warns_of_the_tail(numbers):
    opened, answers, ended = cut(request_of(numbers, frames=[5, 17], select="tile"))
    clips = by_clip(answers)
    assert [sum(len(c.planes_T3HW) for c in chunks) for chunks in clips.values()] == [17] * 5 + [5] * 3
    assert [n for chunks in clips.values() for n in frames_of(chunks)] == [i % 16 for i in range(100)]
    assert not any(warning.startswith("tail_frames") for warning in opened.info.warnings)
    assert ended.frames_decoded == 100
    opened, _, _ = cut(request_of(numbers, frames=17, select="tile"))
    assert "tail_frames:15" in opened.info.warnings


@pytest.mark.parametrize("select", ["slide:5", "slide:17", "slide:30", "uniform:4", "tile"])
@pytest.mark.parametrize("fps", ["source", 12.0, 40.0])
def test_a_clip_does_not_depend_on_the_other_clips(texture, select, fps):
    opened, answers, ended = cut(request_of(texture, frames=17, select=select, fps=fps, min_fps_ratio=0.5))
    clips = by_clip(answers)
    assert len(clips) == len(opened.clips) > 1
    assert ended.frames_decoded <= 100  # one pass, although clips overlap
    length = {"source": 100, 12.0: 48, 40.0: 160}[fps]
    everything = cut(request_of(texture, frames=length // 4 * 4 - 3, fps=fps, min_fps_ratio=0.5, chunk_frames=0))[1]
    reference = planes_of(by_clip(everything)[0])
    for clip in opened.clips:
        stop = min(clip.start + 17, len(reference))
        got = planes_of(clips[clip.index])[: stop - clip.start]
        assert np.array_equal(got, reference[clip.start : stop])


def test_sampling_by_time(numbers):
    _, answers, _ = cut(request_of(numbers, frames=17, fps=10.0))
    chunks = by_clip(answers)[0]
    expected = [int(k / 10 * 25 + 1e-9) for k in range(17)]
    assert frames_of(chunks) == [i % 16 for i in expected]
    times = [t for chunk in chunks for t in chunk.pts_s]
    np.testing.assert_allclose(times, np.array(expected) / 25, atol=1e-6)


def test_whole_streams_to_the_last_group(numbers):
    opened, answers, _ = cut(request_of(numbers, select="whole", chunk_frames=16))
    assert opened.clips[0].bucket.frames == 0
    assert "tail_frames:3" in opened.info.warnings
    chunks = by_clip(answers)[0]
    assert [len(chunk.planes_T3HW) for chunk in chunks] == [17, 16, 16, 16, 16, 16]
    assert [chunk.last for chunk in chunks] == [False] * 5 + [True]


def test_fewer_uniform_clips_than_requested_are_a_warning(numbers):
    opened, answers, _ = cut(request_of(numbers, frames=33, select="uniform:5"))
    assert "uniform_clips:3/5" in opened.info.warnings
    assert list(by_clip(answers)) == [0, 1, 2]


def test_two_buckets_in_one_video(texture):
    opened, answers, _ = cut(request_of(texture, buckets=["65x48x64", "5x32x32"], select="tile"))
    assert [str(clip.bucket) for clip in opened.clips] == ["65x48x64"] + ["5x32x32"] * 7
    assert {chunk.planes_T3HW.shape[2:] for chunks in by_clip(answers).values() for chunk in chunks} == {
        (48, 64),
        (32, 32),
    }


def test_a_rotated_video_gets_a_portrait_bucket():
    data = encode(8, size=(48, 96), rotation=-90, options=FAST)
    opened, answers, _ = cut(request_of(data, frames=5, size=["32x64", "64x32"]))
    assert str(opened.clips[0].bucket) == "5x64x32"
    assert answers[0].planes_T3HW.shape == (5, 3, 64, 32)


# --- refusals and failures --------------------------------------------------------------------------------------------


def test_a_video_that_gives_no_clip_ends_at_once(numbers):
    opened, answers, ended = cut(request_of(numbers, frames=201))
    assert (opened.clips, answers) == ((), [])
    assert [(r.reason, r.key, r.uri) for r in opened.rejects] == [("too_short", "key", "s3://bucket/a.tar")]
    assert ended.frames_decoded == 1


def test_open_raises_for_undecodable_bytes():
    with pytest.raises(DamagedInput) as caught:
        Cutter(request_of(b"nothing")).open()
    assert caught.value.reason == "undecodable"


def cut_off(data: bytes) -> bytes:
    return data[: len(data) * 3 // 5]


@pytest.fixture(scope="module")
def faststart() -> bytes:
    return encode(
        60, options={"preset": "fast", "g": "60"}, picture=textured, container_options={"movflags": "faststart"}
    )


def test_clips_of_a_truncated_file_are_cut_and_the_truncation_is_rejected(faststart):
    opened, answers, _ = cut(request_of(cut_off(faststart), frames=9, select="tile"))
    assert len(opened.clips) >= 2
    assert [(r.reason, r.stage, r.policy, r.clip) for r in opened.rejects] == [("truncated", "decode", False, None)]
    assert opened.rejects[0].frames_recovered == opened.info.num_frames < 60
    finished = {a.clip for a in answers if isinstance(a, FrameChunk) and a.last}
    failed = {a.clip: a.reject for a in answers if isinstance(a, ClipFailed)}
    assert finished | set(failed) == {clip.index for clip in opened.clips}
    assert finished


def test_a_truncated_file_gives_no_whole_clip(faststart):
    opened, answers, _ = cut(request_of(cut_off(faststart), select="whole"))
    assert (opened.clips, answers) == ((), [])
    assert opened.rejects[0].reason == "truncated"


def test_clips_before_a_break_of_the_stream_stand_and_the_others_fail():
    # A packet of HEVC that says it is longer than it is: the decoder refuses it, after half of the stream.
    data = bytearray(
        encode(60, codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"}, picture=textured)
    )
    at = len(data) // 2
    data[at : at + 2000] = b"\xff" * 2000
    opened, answers, _ = cut(request_of(bytes(data), frames=5, select="tile"))
    kinds = [type(answer) for answer in answers]
    assert FrameChunk in kinds
    failures = [answer for answer in answers if isinstance(answer, ClipFailed)]
    assert failures
    whole = {answer.clip for answer in answers if isinstance(answer, FrameChunk) and answer.last}
    assert whole | {failure.clip for failure in failures} == set(range(len(opened.clips)))
    for failure in failures:
        assert failure.reject.clip == failure.clip
        assert (failure.reject.reason, failure.reject.policy, failure.reject.stage) == (
            "corrupt_stream",
            False,
            "decode",
        )
        assert (failure.reject.key, failure.reject.uri) == ("key", "s3://bucket/a.tar")
        assert 0 <= failure.reject.frames_recovered < 5


def test_fewer_frames_than_packets_is_ended_early(numbers, monkeypatch):
    # No file is known to do this; the frames of a real one are withheld instead.
    give = FrameStream.next
    monkeypatch.setattr(FrameStream, "next", lambda self: None if self.position >= 30 else give(self))
    _, answers, _ = cut(request_of(numbers, frames=17, select="tile"))
    assert [a.reject.reason for a in answers if isinstance(a, ClipFailed)] == ["ended_early"] * 4
    assert {a.clip for a in answers if isinstance(a, FrameChunk) and a.last} == {0}


# --- in a process -----------------------------------------------------------------------------------------------------


def test_requests_and_answers_can_be_pickled(texture):
    request = request_of(texture, frames=17)
    again = pickle.loads(pickle.dumps(request))  # noqa: S301  # ours
    opened, answers, _ = cut(again)
    assert pickle.loads(pickle.dumps(opened)) == opened  # noqa: S301  # ours
    assert np.array_equal(planes_of(by_clip(answers)[0]), planes_of(by_clip(cut(request)[1])[0]))


def test_next_after_the_end_and_close_at_any_time_are_allowed(numbers):
    cutter = Cutter(request_of(numbers, frames=17))
    cutter.close()
    cutter.open()
    assert isinstance(cutter.next(), FrameChunk)
    cutter.close()
    ended = cutter.next()
    assert isinstance(ended, VideoEnded)
    assert ended.frames_decoded > 0
    assert isinstance(cutter.next(), VideoEnded)
    cutter.close()


def test_the_deliberate_failure_happens_once_after_the_first_chunk(numbers, tmp_path: Path):
    drill = {"point": "in_decoder", "action": "raise", "marker_dir": str(tmp_path)}
    cutter = Cutter(request_of(numbers, frames=17, drill=drill))
    cutter.open()
    with pytest.raises(TransientError, match="deliberate failure at in_decoder"):
        cutter.next()
    assert [path.name for path in tmp_path.iterdir()] == ["in_decoder-0"]
    cutter.close()
    assert len(by_clip(cut(request_of(numbers, frames=17, drill=drill))[1])[0]) == 2


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path):
    # Peak resident memory of a fresh process, for 8 and 120 s of 320x180: a file read from disk, streamed whole.
    script = (
        "import sys, resource\n"
        "from tests.pipeline.test_cutting import request_of, Cutter, VideoEnded\n"
        "cutter = Cutter(request_of(sys.argv[1], select='whole', size='128x128', chunk_frames=16))\n"
        "cutter.open()\n"
        "frames = 0\n"
        "while not isinstance(chunk := cutter.next(), VideoEnded):\n"
        "    frames += len(chunk.planes_T3HW)\n"
        "print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    peaks = {}
    scene = [textured(i, 320, 180) for i in range(16)]
    for seconds in (8, 120):
        path = tmp_path / f"{seconds}.mp4"
        write(str(path), [scene[i % 16] for i in range(seconds * 30)], size=(180, 320), options=FAST)
        answer = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        frames, peaks[seconds] = map(int, answer.stdout.split())
        assert frames == seconds * 30 // 4 * 4 - 3
    assert peaks[120] < peaks[8] * 1.1, peaks


@pytest.mark.parametrize("select", ["tile", "spans"])
@pytest.mark.parametrize("upscale", [False, True])
def test_frames_that_shrink_fail_their_clip_unless_clips_upscale(select, upscale):
    large, small = (encode(20, size=(side, side), container="mpegts", options=FAST) for side in (64, 32))
    request = request_of(large + small + large, frames=5, select=select, upscale=upscale)
    spans = tuple(TimeSpan(start, start + 5, "frames") for start in range(0, 60, 5))
    _, answers, _ = cut(dataclasses.replace(request, video=dataclasses.replace(request.video, time_spans=spans)))
    failed = {answer.clip: answer.reject.reason for answer in answers if isinstance(answer, ClipFailed)}
    assert failed == ({} if upscale else dict.fromkeys(range(4, 8), "size_changed"))

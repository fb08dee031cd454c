"""Damaged frames: their clips are rejected, or kept with a warning. The pixels of a frame are the same for any clip rule."""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.records import ClipFailed, EncodedVideo, FrameChunk, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import open_video
from tests.odd_inputs import damage
from tests.tiny_corpus import receipts, tiny_job

RULES = ("tile", "slide:3", "slide:1", "slide:41", "uniform:3", "head")
HARMED = ("h264-b-mkv", "hevc-mkv", "vp9-mkv", "mpeg2-ts", "mpeg4-mp4", "h264-avi")


@cache
def harmed(kind: str) -> bytes:
    """96 frames, a keyframe every 24; the packets at 30 and 50 are noise."""
    return damage.edited(damage.KINDS[kind], damage.harming(30, 50))


def cut(data: bytes, select: str, policy: str) -> list[FrameChunk | ClipFailed]:
    rules = resolve_rules(validate(ClipConfig, {"size": "64x96", "frames": 5, "select": select}), 4, 8, "leanvae")
    limits = validate(DecodeConfig, {"damage": policy})
    cutter = Cutter(CutRequest(EncodedVideo("key", "uri", data), rules, limits, 8, validate(DrillConfig, {})))
    cutter.open()
    answers: list[FrameChunk | ClipFailed] = []
    while not isinstance(answer := cutter.next(), VideoEnded):
        answers.append(answer)
    return answers


@pytest.mark.parametrize("kind", HARMED)
@pytest.mark.parametrize("policy", ["reject", "warn"])
def test_any_rule_gives_the_same_pixels_for_the_same_frame(kind, policy):
    assert_same_by_any_rule(harmed(kind), policy)


def test_kept_damage_around_a_keyframe_does_not_depend_on_where_decoding_begins():
    kind = damage.KINDS["vp8-webm"]  # its decoder repeats the frame before
    assert_same_by_any_rule(damage.edited(kind, damage.harming(*range(40, 60, 2))), "warn")


def assert_same_by_any_rule(data: bytes, policy: str) -> None:
    seen: dict[float, np.ndarray] = {}
    compared = 0
    for select in RULES:
        for chunk in cut(data, select, policy):
            if isinstance(chunk, ClipFailed):
                continue
            for time_s, planes in zip(chunk.pts_s, chunk.planes_T3HW, strict=True):
                compared += time_s in seen
                assert np.array_equal(seen.setdefault(time_s, planes), planes), (select, time_s)
    assert compared > 40


@pytest.mark.parametrize("kind", HARMED)
def test_a_damaged_frame_rejects_the_clips_that_hold_it_or_is_counted(kind):
    answers = cut(harmed(kind), "tile", "reject")
    lost = {answer.clip for answer in answers if isinstance(answer, ClipFailed)}
    whole = {answer.clip for answer in answers if isinstance(answer, FrameChunk) and answer.last}
    # Clip n holds frames 5n to 5n + 4. The first and the last group are whole, the second up to its damage. In a transport
    # stream noise has no beginning of its own and goes to the packet before; to VP9 some noise says "the same frame again".
    assert {0, 1, 2, 3, 4} | {15, 16, 17} <= whole
    assert {6, 7, 8} & lost
    assert {10, 11, 12, 13} & lost or kind == "vp9-mkv"
    reasons = {(a.reject.reason, a.reject.policy) for a in answers if isinstance(a, ClipFailed)}
    assert reasons == {("corrupt_stream", False)}
    kept = cut(harmed(kind), "tile", "warn")
    assert not [answer for answer in kept if isinstance(answer, ClipFailed)]
    assert {a.clip for a in kept if isinstance(a, FrameChunk) and a.damaged} == lost


def test_the_message_names_the_cause_and_the_damaged_frames():
    video = open_video(harmed("h264-b-mkv"), validate(DecodeConfig, {}))
    with pytest.raises(pipeline.errors.DamagedInput, match=r"packet 30 .*frames 2\d to 47 depend on it"):
        for _ in map(video.show, range(96)):
            pass
    assert video.show(60 + 12).index == 72  # and later frames can be asked for


def test_a_row_counts_its_damaged_frames(tmp_path):
    source = tmp_path / "harmed.mkv"
    source.write_bytes(harmed("h264-b-mkv"))
    clips = {"clips.select": "tile", "clips.frames": 9, "clips.size": "64x64"}
    pipeline.encode(tiny_job(source, tmp_path / "kept", **clips, **{"decode.damage": "warn"}))
    rows = [row for path in (tmp_path / "kept").rglob("data/**/*.parquet") for row in pq.read_table(path).to_pylist()]
    damaged = {row["clip_index"]: row["warnings"] for row in rows if "damaged_frames" in str(row["warnings"])}
    assert len(rows) == 10
    assert 3 in damaged
    pipeline.encode(tiny_job(source, tmp_path / "strict", **clips))
    (receipt,) = receipts(tmp_path / "strict")
    assert {reject.clip for reject in receipt.rejects} == set(damaged)
    assert receipt.counts.clips == 10 - len(damaged)

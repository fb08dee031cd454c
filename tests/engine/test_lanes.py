"""Decoder processes are real, and really die."""

import os
import signal
import time

import pytest

from pipeline.clips import resolve_rules
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig
from pipeline.cutting import CutRequest
from pipeline.engine.lanes import LaneReady, ProcessLanes
from pipeline.errors import DamagedInput, WorkerLost
from pipeline.records import FrameChunk, OpenedVideo, Sample, VideoEnded
from tests.tiny_corpus import video_bytes

RULES = resolve_rules(ClipConfig(frames=(5,), size=("32x32",), select="tile"), 4, 8, "leanvae")


def request(video=None):
    sample = Sample("key", 0, "file.mp4", video_bytes(10) if video is None else video, "mp4")
    return CutRequest(sample, RULES, DecodeConfig(), 4, DrillConfig())


@pytest.fixture
def lanes():
    made = ProcessLanes(2, 4 << 30)
    answers = collect(made, 2)
    assert sorted(answers) == [(0, -1, LaneReady()), (1, -1, LaneReady())]
    yield made
    made.close()


def collect(lanes, count, timeout_s=20.0):
    answers, deadline = [], time.monotonic() + timeout_s
    while len(answers) < count:
        assert time.monotonic() < deadline, f"only {answers}"
        answers += lanes.wait(0.2)
    return answers


def test_a_video_is_answered_by_pull_in_order(lanes):
    lanes.open(1, 7, request())
    for _ in range(4):
        lanes.pull(1, 7)
    answers = collect(lanes, 5)
    assert {(lane, ticket) for lane, ticket, _ in answers} == {(1, 7)}
    kinds = [type(answer) for _, _, answer in answers]
    assert kinds == [OpenedVideo, FrameChunk, FrameChunk, VideoEnded, VideoEnded]
    chunk = answers[1][2]
    assert chunk.planes_T3HW.shape == (5, 3, 32, 32)
    assert chunk.planes_T3HW.std() > 10  # a picture, not an empty buffer


def test_garbage_is_an_answer_and_the_lane_lives_on(lanes):
    lanes.open(0, 1, request(b"not a video"))
    ((_, _, answer),) = collect(lanes, 1)
    assert isinstance(answer, DamagedInput)
    assert answer.reason == "undecodable"
    lanes.open(0, 2, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)


def test_a_killed_lane_says_so_and_is_replaced(lanes):
    os.kill(lanes.pids()[0], signal.SIGKILL)
    ((lane, _, answer),) = collect(lanes, 1)
    assert lane == 0
    assert isinstance(answer, WorkerLost)
    before = lanes.pids()
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]
    assert lanes.pids()[0] != before[0]
    assert lanes.pids()[1] == before[1]
    lanes.open(0, 3, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)


def test_close_ends_the_processes(lanes):
    pids = lanes.pids()
    lanes.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

"""Lanes as real child processes, which are killed, crash and hang."""

import errno
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pipeline
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.errors import DamagedInput, WorkerLost
from pipeline.records import FrameChunk, OpenedVideo, Sample, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest
from tests.tiny_corpus import video_bytes

fresh = pytest.mark.usefixtures("fresh_decoders")  # others are forked, see `tests.forked_decoders`

RULES = resolve_rules(ClipConfig(frames=(5,), size=("32x32",), select="tile"), 4, 8, "leanvae")


def request(video=None):
    sample = Sample("key", 0, "file.mp4", video_bytes(10) if video is None else video, "mp4")
    return CutRequest(sample.encoded_video, RULES, DecodeConfig(), 4, DrillConfig())


@pytest.fixture
def lanes():
    made = ProcessLanes(2, 4 << 30)
    answers = collect(made, 2)
    assert sorted(answers) == [(0, -1, LaneReady()), (1, -1, LaneReady())]
    yield made
    made.close()


def collect(lanes, count, timeout_s=240.0):
    answers, deadline = [], time.monotonic() + timeout_s
    while len(answers) < count:
        assert time.monotonic() < deadline, f"only {answers}"
        answers += lanes.wait(0.2)
    return answers


@fresh
def test_a_video_is_answered_by_pull_in_order(lanes):
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in lanes.pids())  # Ctrl-C in a terminal does not reach them
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


def test_undecodable_bytes_are_answered_and_the_lane_continues(lanes):
    lanes.open(0, 1, request(b"not a video"))
    ((_, _, answer),) = collect(lanes, 1)
    assert isinstance(answer, DamagedInput)
    assert answer.reason == "undecodable"
    lanes.open(0, 2, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)


@fresh
def test_killed_or_crashed_lane_is_reported_and_replaced(lanes):
    os.kill(lanes.pids()[0], signal.SIGKILL)
    ((lane, _, answer),) = collect(lanes, 1)
    assert lane == 0
    assert isinstance(answer, WorkerLost)
    assert (answer.blame, answer.message) == (False, "decoder process was killed from outside by signal 9 (SIGKILL)")
    os.kill(lanes.pids()[1], signal.SIGSEGV)
    ((lane, _, crash),) = collect(lanes, 1)
    assert lane == 1
    assert (crash.blame, crash.message) == (True, "decoder process ended: segmentation fault (SIGSEGV)")
    before = lanes.pids()
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]
    assert lanes.pids()[0] != before[0]
    assert lanes.pids()[1] == before[1]
    lanes.open(0, 3, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)


@fresh
def test_close_ends_the_processes(lanes):
    pids = lanes.pids()
    lanes.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_answer_of_a_process_that_was_replaced_is_dropped(lanes):
    lanes.open(0, 1, request())
    os.kill(lanes.pids()[0], signal.SIGKILL)
    deadline = time.monotonic() + 240.0
    while lanes._answers.qsize() == 0:  # until the drain thread has reported the loss
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]


def talking(monkeypatch, code):
    """Lanes whose processes run `code`, with `descriptor` as their end of the pipe."""
    popen = subprocess.Popen

    def spawn(arguments, **options):
        script = f"import os, struct, sys, time; descriptor = int(sys.argv[1]); {code}"
        return popen([sys.executable, "-c", script, arguments[3]], **options)

    monkeypatch.setattr(subprocess, "Popen", spawn)
    return ProcessLanes(1, 4 << 30)


@fresh
@pytest.mark.parametrize(
    ("code", "blame", "expected"),
    [
        (
            "os.write(descriptor, struct.pack('!i', 7) + b'garbage'); time.sleep(60)",
            True,
            "cannot be read (UnpicklingError",
        ),
        ("os.write(descriptor, struct.pack('!i', 4) + b'N.')", True, "exit code 0"),
        ("os.write(descriptor, struct.pack('!i', 2) + b'N.'); time.sleep(60)", True, "cannot be read (TypeError"),
        ("sys.exit(7)", True, "exit code 7"),
        ("os.kill(os.getpid(), 15)", False, "SIGTERM"),
    ],
)
def test_lane_with_an_unreadable_answer_is_lost_and_the_thread_continues(monkeypatch, code, blame, expected):
    lanes = talking(monkeypatch, code)
    for _ in range(2):
        ((lane, ticket, answer),) = collect(lanes, 1)
        assert (lane, ticket, type(answer), answer.blame) == (0, -1, WorkerLost, blame)
        assert expected in answer.message
        lanes.restart(0)
    lanes.close()


@fresh
def test_process_that_closes_its_pipe_and_continues_is_lost(monkeypatch):
    monkeypatch.setattr("pipeline.engine.decoders.process_lanes.REAP_S", 0.2)
    lanes = talking(monkeypatch, "os.close(descriptor); time.sleep(60)")
    ((_, _, answer),) = collect(lanes, 1)
    assert (answer.blame, answer.message) == (True, "decoder process closed its pipe and went on")
    lanes.close()


@fresh
@pytest.mark.parametrize("message", [b"", struct.pack("!i", 1000) + b"half a message"])
def test_decoder_without_an_owner_ends_silently(lanes, capfd, message):
    child = lanes._spawn()
    if message:
        child.pipe.recv()
        os.write(child.pipe.fileno(), message)
    child.sender.end()
    child.pipe.close()
    assert child.process.wait(30) == 0
    assert capfd.readouterr() == ("", "")


def test_restarts_under_load_lose_no_answer_and_leave_no_process(lanes):
    """The drain thread is in the middle of large answers when their lane is replaced."""
    large = request(video_bytes(29, 256, 256))
    large = CutRequest(
        large.video,
        resolve_rules(ClipConfig(frames=(29,), size=("256x256",)), 4, 8, "n"),
        *[DecodeConfig(), 0, DrillConfig()],
    )
    pids = set(lanes.pids())
    for ticket in range(4):
        lanes.open(0, ticket, large)
        lanes.pull(0, ticket)
        if ticket % 2:
            collect(lanes, 1)
        lanes.restart(0)
        pids |= set(lanes.pids())
        assert collect(lanes, 1) == [(0, -1, LaneReady())]
    lanes.open(0, 99, large)
    lanes.pull(0, 99)
    assert [type(answer) for _, _, answer in collect(lanes, 2)] == [OpenedVideo, FrameChunk]
    lanes.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_close_ends_a_send_to_a_process_that_does_not_read(lanes):
    def senders():
        return [thread for thread in threading.enumerate() if thread.name == "lane-sender" and thread not in before]

    before = set(threading.enumerate())
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]
    (sending,) = senders()
    os.kill(lanes.pids()[0], signal.SIGSTOP)
    lanes.open(0, 1, request(bytes(1 << 22)))
    sending.join(0.2)
    assert sending.is_alive()
    lanes.close()
    sending.join(20)
    assert not sending.is_alive()


def test_stopped_process_blocks_neither_the_sender_nor_the_other_lane(lanes):
    os.kill(lanes.pids()[0], signal.SIGSTOP)
    lanes.open(0, 1, request(os.urandom(8 << 20)))  # more than a pipe takes
    lanes.open(1, 2, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]
    lanes.open(0, 3, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)


@fresh
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
def test_process_that_cannot_start_is_lost_without_blame_and_started_again(lanes, monkeypatch, number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    before = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", fail)
        lanes.restart(0)
        lanes.open(0, 1, request())
        ((lane, ticket, answer),) = collect(lanes, 1)
    assert (lane, ticket, answer.blame) == (0, -1, False)
    assert answer.message == f"decoder process cannot be started: {os.strerror(number)}"
    assert not lanes.reading(0)
    lanes.restart(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]
    lanes.open(0, 2, request())
    assert isinstance(collect(lanes, 1)[0][2], OpenedVideo)
    deadline = time.monotonic() + 240  # the threads of the processes before end by themselves, a little later
    while threading.active_count() > before:
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.01)


def test_reading_is_true_while_a_process_reads_its_file(lanes, tmp_path):
    """A FIFO without a writer hangs the decoder in `open`, as a dead mount does."""
    os.mkfifo(tmp_path / "hung.mp4")
    assert not lanes.reading(0)
    lanes.open(0, 1, request(str(tmp_path / "hung.mp4")))
    deadline = time.monotonic() + 240
    while not lanes.reading(0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not lanes.reading(1)
    lanes.restart(0)
    assert not lanes.reading(0)
    assert collect(lanes, 1) == [(0, -1, LaneReady())]


@fresh
def test_decoder_processes_import_the_packages_of_their_owner(lanes):
    root = Path(pipeline.__file__).parents[1]
    for pid in lanes.pids():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        (search_path,) = (entry for entry in environment if entry.startswith(b"PYTHONPATH="))
        assert search_path.removeprefix(b"PYTHONPATH=").split(b":")[0] == bytes(root.resolve())

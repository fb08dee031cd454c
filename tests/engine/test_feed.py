"""The feed over real decoder processes: every sample has an end, retries after a death, byte budgets, cancelled owners."""

import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import replace

import pytest

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig
from pipeline.engine.decoders.feed import STEPS_AHEAD, Feed
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.losses import Restarted
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.errors import BuildError
from pipeline.records import FrameChunk, OpenedVideo, Reject, Sample, VideoEnded
from pipeline.video import black_bars
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import Cutter
from tests.tiny_corpus import video_bytes

RULES = resolve_rules(ClipConfig(frames=(5,), size=("32x32",), select="tile"), 4, 8, "leanvae")
CHUNK = 5 * 3 * 32 * 32


class Samples:
    """A source with a fixed list."""

    def __init__(self, *items):
        self.items = list(items)
        self.given = 0

    def next_sample(self):
        if not self.items:
            return None
        self.given += 1
        return self.items.pop(0)


@pytest.fixture
def run(tmp_path):
    opened = []

    def start(source, *, drill=None, lanes=2, frame_bytes=1 << 24, batch=1 << 10, **limits):
        workers = ProcessLanes(lanes, 4 << 30)
        feed = Feed(
            workers,
            source,
            rules=RULES,
            limits=DecodeConfig(**limits),
            drill=drill or DrillConfig(),
            chunk_frames=4,
            frame_bytes=frame_bytes,
            largest_batch=lambda shape: batch,
        )
        opened.append((feed, workers))
        feed.start()
        return feed

    yield start
    for feed, workers in opened:
        feed.close()
        workers.close()


def sample(index, frames=10, video=None):
    return Sample(f"k{index}", index, "u", video_bytes(frames, seed=index) if video is None else video, "mp4")


def collect(feed, *, ended, timeout_s=240.0, consume=True):
    """Events by sample key until `ended` samples have ended or been rejected."""
    events = defaultdict(list)
    deadline, count = time.monotonic() + timeout_s, 0
    while count < ended:
        assert time.monotonic() < deadline, dict(events)
        for event in feed.events(0.2):
            events[event.owner, event.sample.key].append(event.what)
            count += isinstance(event.what, VideoEnded | Reject)
            if consume and isinstance(event.what, FrameChunk):
                feed.consumed(event.what.nbytes)
    return events


def kinds(events):
    return [type(what).__name__ for what in events]


def test_every_sample_is_opened_cut_and_ended(run):
    events = collect(run(Samples(*[("owner", sample(n)) for n in range(5)])), ended=5)
    assert len(events) == 5
    for history in events.values():
        assert kinds(history) == ["OpenedVideo", "FrameChunk", "FrameChunk", "VideoEnded"]


def test_damaged_video_is_rejected_and_the_others_continue(run):
    events = collect(run(Samples(("o", sample(0, video=b"junk")), ("o", sample(1)))), ended=2)
    (reject,) = events["o", "k0"]
    assert (reject.reason, reject.stage, reject.policy, reject.key) == ("undecodable", "decode", False, "k0")
    assert kinds(events["o", "k1"])[-1] == "VideoEnded"


def test_a_decoder_killed_once_is_a_restart_and_the_frames_are_the_same(run, tmp_path):
    undisturbed = collect(run(Samples(("o", sample(0)))), ended=1)["o", "k0"]
    drill = DrillConfig(point="in_decoder", marker_dir=str(tmp_path))
    history = collect(run(Samples(("o", sample(0))), drill=drill), ended=1)["o", "k0"]
    restart = kinds(history).index("Restarted")
    again = history[restart + 1 :]
    assert kinds(again) == kinds(undisturbed)
    for a, b in zip(again, undisturbed, strict=True):
        if isinstance(a, FrameChunk):
            assert (a.planes_T3HW == b.planes_T3HW).all()


def test_video_that_crashes_two_decoders_is_rejected_and_the_next_is_not(run, tmp_path):
    drill = DrillConfig(point="in_decoder", action="crash", marker_dir=str(tmp_path), times=2)
    events = collect(run(Samples(("o", sample(0)), ("o", sample(1))), drill=drill, lanes=1), ended=2)
    reject = events["o", "k0"][-1]
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.policy) == ("decoder_crashed", False)
    assert reject.message == "decoder process ended: segmentation fault (SIGSEGV), 2 times"
    assert sum(isinstance(what, Restarted) for what in events["o", "k0"]) == 1
    assert kinds(events["o", "k1"])[-1] == "VideoEnded"


def test_two_kills_from_outside_lose_no_frame(run, tmp_path):
    undisturbed = collect(run(Samples(("o", sample(0)))), ended=1)["o", "k0"]
    drill = DrillConfig(point="in_decoder", marker_dir=str(tmp_path), times=2)
    history = collect(run(Samples(("o", sample(0))), drill=drill, lanes=1), ended=1)["o", "k0"]
    assert len(os.listdir(tmp_path)) == 2
    restarts = [n for n, kind in enumerate(kinds(history)) if kind == "Restarted"]
    assert len(restarts) == 2
    assert kinds(history[restarts[-1] + 1 :]) == kinds(undisturbed)


def test_a_decoder_that_hangs_is_killed_at_the_time_limit(run, tmp_path):
    drill = DrillConfig(point="in_decoder", action="hang", marker_dir=str(tmp_path), times=2)
    begun = time.monotonic()
    events = collect(run(Samples(("o", sample(0)), ("o", sample(1))), drill=drill, timeout_s=1.0, lanes=1), ended=2)
    reject = events["o", "k0"][-1]
    assert (reject.reason, "1 s" in reject.message) == ("decode_timeout", True)
    assert kinds(events["o", "k1"])[-1] == "VideoEnded"
    assert time.monotonic() - begun > 2.0  # both tries had their time


def test_decoders_that_never_come_up_stop_the_build(run, monkeypatch, fresh_decoders):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no interpreter starts under this
    feed = run(Samples(("o", sample(0))))
    with pytest.raises(
        BuildError, match=r"6 decoder processes in a row died before they were up; the last: .* exit code 1$"
    ):
        collect(feed, ended=1)


@pytest.mark.parametrize(("budget", "chunks_at_most"), [({"frame_bytes": 2 * CHUNK}, 2), ({"batch": 1}, STEPS_AHEAD)])
def test_decoded_bytes_stay_within_the_budget_until_consumed(run, budget, chunks_at_most):
    source = Samples(*[("o", sample(n, frames=49)) for n in range(4)])
    feed = run(source, **budget)
    held, deadline, quiet = 0, time.monotonic() + 240, 0
    while quiet < 10:  # turns in which nothing arrives although nothing was consumed: the budget is used up
        arrived = sum(event.what.nbytes for event in feed.events(0.1) if isinstance(event.what, FrameChunk))
        held += arrived
        quiet = quiet + 1 if held >= chunks_at_most * CHUNK // 2 and not arrived else 0
        assert time.monotonic() < deadline
    assert held <= chunks_at_most * CHUNK
    feed.consumed(held)
    assert len(collect(feed, ended=4)) == 4


class InProcessCutters:
    """Lanes that cut in this process and thread; answers are ready at the next `wait`."""

    def __init__(self, count):
        self.count = count
        self.cutters = {}
        self.pulls = [0] * count
        self.answers = [(lane, 0, LaneReady()) for lane in range(count)]

    def open(self, lane, ticket, request):
        self.cutters[lane] = Cutter(request)
        self.answers.append((lane, ticket, self.cutters[lane].open()))

    def pull(self, lane, ticket):
        self.pulls[lane] += 1
        self.answers.append((lane, ticket, self.cutters[lane].next()))

    def wait(self, timeout_s):
        answers, self.answers = self.answers, []
        return answers

    start_limit_s = float("inf")

    def reading(self, lane):
        return False

    def receiving(self, lane):
        return False


WHOLE = 1 << 20  # frames: what a network that encodes clips whole asks for


def feed_here(lanes, source, clip_config, chunk_frames, *, lead=1, frame_bytes=1 << 24, largest_batch):
    return Feed(
        lanes,
        source,
        rules=resolve_rules(clip_config, 4, 8, "net", lead),
        limits=DecodeConfig(),
        drill=DrillConfig(),
        chunk_frames=chunk_frames,
        frame_bytes=frame_bytes,
        largest_batch=largest_batch,
    )


@pytest.mark.parametrize("chunk_frames", [4, WHOLE])
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(
    "rules",
    [
        {"select": "tile"},
        {"select": "whole"},
        {"select": "whole", "fps": 3.0},
        {"select": "whole", "fps": 30.0, "min_fps_ratio": 0.0},
    ],
)
def test_largest_expected_chunk_is_the_largest_that_arrives(chunk_frames, lead, rules):
    """Of a video of 25 frames, 8 a second."""
    shapes, events = [], []
    feed = feed_here(
        InProcessCutters(1),
        Samples(("o", sample(0, frames=25))),
        ClipConfig(frames=(8 + lead,), size=("32x32",), **rules),
        chunk_frames,
        lead=lead,
        largest_batch=lambda shape: shapes.append(shape) or 1,
    )
    for _ in range(80):  # turns; the longest video takes 40
        arrived = [event.what for event in feed.pump(1.0)]
        feed.consumed(sum(what.nbytes for what in arrived if isinstance(what, FrameChunk)))
        events += arrived
    assert kinds(events)[-1] == "VideoEnded"
    chunks = [what for what in events if isinstance(what, FrameChunk)]
    ((first, frames, height, width),) = shapes
    longest = max(len(chunk.pts_s) for chunk in chunks)
    assert (first, height, width) == (False, 32, 32)
    assert longest <= frames <= longest + (chunk_frames != WHOLE and lead == 0)  # one spare where no frame leads


def test_a_decoder_that_still_looks_for_black_bars_is_asked_again(monkeypatch):
    """Each answer begins a new time limit; none is an event."""
    monkeypatch.setattr(black_bars, "FRAMES_AT_ONCE", 4)
    lanes = InProcessCutters(1)
    rules = ClipConfig(frames=(5,), size=("32x32",), select="tile", crop="letterbox", variants=("flip",))
    feed = feed_here(lanes, Samples(("o", sample(0, frames=25))), rules, 4, largest_batch=lambda shape: 1)
    events = []
    for _ in range(40):
        arrived = [event.what for event in feed.pump(1.0)]
        feed.consumed(sum(what.nbytes for what in arrived if isinstance(what, FrameChunk)))
        events += arrived
    assert kinds(events) == ["OpenedVideo"] + ["FrameChunk"] * 10 + ["VideoEnded"]
    assert [what.clip for what in events[1:-1]] == list(range(10))
    assert lanes.pulls[0] >= 7 + 11  # of these seven until it is open


def test_video_shorter_than_a_group_counts_as_one_group():
    shapes = []
    feed = feed_here(
        InProcessCutters(1),
        Samples(("o", sample(0, frames=3))),
        ClipConfig(size=("32x32",), select="whole"),
        WHOLE,
        largest_batch=lambda shape: shapes.append(shape) or 1,
    )
    for _ in range(4):
        feed.pump(1.0)
    assert shapes == [(False, 4, 32, 32)]


@pytest.mark.parametrize("rules", [{"frames": (17,), "select": "head"}, {"select": "whole"}])
def test_whole_clips_use_the_budget_over_all_lanes(rules):
    clip_bytes = 17 * 3 * 32 * 32
    lanes = InProcessCutters(3)
    feed = feed_here(
        lanes,
        Samples(*[("o", sample(n, frames=18)) for n in range(30)]),
        ClipConfig(size=("32x32",), **rules),
        WHOLE,
        frame_bytes=10 * clip_bytes,
        largest_batch=lambda shape: 4,
    )
    held, most_lanes = 0, 0
    for _ in range(60):  # without a consumer
        before = list(lanes.pulls)
        held += sum(event.what.nbytes for event in feed.pump(1.0) if isinstance(event.what, FrameChunk))
        most_lanes = max(most_lanes, sum(now > then for now, then in zip(lanes.pulls, before, strict=True)))
    assert most_lanes == 3
    assert 9 * clip_bytes <= held <= 10 * clip_bytes  # the end of a video, too, is asked for as if it were a clip


def test_wake_ends_a_wait_for_events(run):
    feed = run(Samples())
    begun = time.monotonic()
    threading.Timer(0.2, feed.wake).start()
    assert feed.events(280.0) == []
    assert 0.2 <= time.monotonic() - begun < 240.0


def test_cancelled_owner_gets_no_further_event(run):
    gone = [("gone", sample(n, frames=29)) for n in range(2)]
    stays = [("stays", sample(n)) for n in range(2, 4)]
    source = Samples(*gone)
    feed = run(source, frame_bytes=2 * CHUNK)
    events, deadline = [], time.monotonic() + 240.0
    while not any(isinstance(event.what, FrameChunk) for event in events):
        assert time.monotonic() < deadline
        events += feed.events(0.2)
    source.items.clear()  # a decoder that is slow to come up has not taken its sample yet
    feed.cancel("gone")  # its lanes are stuck at the byte budget, in the middle of their videos
    source.items += stays
    consumed = 0
    while sum(isinstance(event.what, VideoEnded) for event in events) < 2:
        assert time.monotonic() < deadline
        for event in events[consumed:]:
            if isinstance(event.what, FrameChunk):
                feed.consumed(event.what.nbytes)
        consumed = len(events)
        events += feed.events(0.2)
    assert [event.owner for event in events if isinstance(event.what, VideoEnded)] == ["stays", "stays"]


def test_decoder_that_hangs_in_a_cancelled_video_is_replaced(run, tmp_path):
    """The next video is larger than a pipe's buffer: sent to a process that never reads, it would block the feed for ever."""
    large = video_bytes(40, 256, 256)
    assert len(large) > 1 << 19
    drill = DrillConfig(point="in_decoder", action="hang", marker_dir=str(tmp_path / "markers"))
    source = Samples(("gone", sample(0, video=large)))
    feed = run(source, drill=drill, lanes=1)
    deadline = time.monotonic() + 240.0
    while not (tmp_path / "markers").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    feed.cancel("gone")
    source.items.append(("stays", sample(1, video=large)))
    assert kinds(collect(feed, ended=1)["stays", "k1"])[-1] == "VideoEnded"


def test_close_returns_while_the_feed_sends_to_a_process_that_does_not_read(run):
    source = Samples()
    feed = run(source, lanes=1)
    deadline = time.monotonic() + 240.0
    while not feed.ready_lanes:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(feed._lanes.pids()[0], signal.SIGSTOP)
    source.items.append(("o", sample(0, video=bytes(1 << 22))))
    while source.items:
        time.sleep(0.02)
    closing = threading.Thread(target=feed.close, daemon=True)
    closing.start()
    closing.join(240.0)
    assert not closing.is_alive()
    assert not feed._thread.is_alive()


def test_decoders_killed_while_they_start_are_started_again(run, fresh_decoders):
    feed = run(Samples(("o", sample(0))), lanes=2)
    killed = set()
    while len(killed) < 8:  # more than may end by themselves
        for pid in set(feed._lanes.pids()) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    assert kinds(collect(feed, ended=1)["o", "k0"])[-1] == "VideoEnded"


def test_a_decoder_gets_no_caption_and_no_metadata(run):
    nested = []
    for _ in range(500):
        nested = [nested]
    huge = {"unpicklable": lambda: None, "nested": nested, "large": "x" * (10 << 20)}
    given = [replace(sample(n), caption="x" * (10 << 20), metadata=huge) for n in range(2)]
    feed = run(Samples(*[("owner", item) for item in given]))
    found, deadline = [], time.monotonic() + 240.0
    while sum(isinstance(event.what, VideoEnded) for event in found) < 2:
        assert time.monotonic() < deadline
        found += feed.events(0.2)
    assert all(event.sample in given and event.sample.metadata is huge for event in found)
    assert all(isinstance(event.what, OpenedVideo | FrameChunk | VideoEnded) for event in found)

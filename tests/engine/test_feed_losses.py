"""Events of the feed after a lost decoder or an error below one, with scripted lanes and a scripted clock."""

import pytest

from pipeline.config import DecodeConfig, DrillConfig
from pipeline.engine.decoders.feed import Feed
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.losses import OUTSIDE_KILLS, Restarted
from pipeline.errors import BuildError, LatheError, SourceChanged, SourceRefused, StorageUnavailable, WorkerLost
from pipeline.records import Reject, Sample, VideoEnded
from tests.engine.test_feed import RULES, Samples


class Scripted:
    """Lanes whose answers to `open` are given, one after the other, by sample key; no processes. A restarted lane is up at once."""

    def __init__(self, count, script):
        self.count = count
        self.script = script
        self.restarts = 0
        self.arriving = set()
        self.in_a_read = set()
        self.answers = [(lane, -1, LaneReady()) for lane in range(count)]

    def open(self, lane, ticket, request):
        if answers := self.script.get(request.video.key):
            answer = answers.pop(0)
            self.answers.append((lane, -1 if isinstance(answer, WorkerLost) else ticket, answer))

    def wait(self, timeout_s):
        answers, self.answers = self.answers, []
        return answers

    def restart(self, lane):
        self.restarts += 1
        self.answers.append((lane, -1, LaneReady()))

    start_limit_s = float("inf")

    def reading(self, lane):
        return lane in self.in_a_read

    def receiving(self, lane):
        return lane in self.arriving


def scripted(script, *, lanes=1, keys=("k",)):
    """A feed over `Scripted` lanes, the lanes, and a function that gives all events of some turns, each a second after the last."""
    now = [0.0]
    made = Scripted(lanes, script)
    feed = Feed(
        made,
        Samples(*[("owner", Sample(key, n, "s3://b/k.tar", b"", "mp4")) for n, key in enumerate(keys)]),
        rules=RULES,
        limits=DecodeConfig(),
        drill=DrillConfig(),
        chunk_frames=4,
        frame_bytes=1 << 24,
        largest_batch=lambda shape: 1,
        clock=lambda: now[0],
    )

    def turns(count):
        events = []
        for _ in range(count):
            events += feed.pump(0.0)
            now[0] += 1.0
        return events

    return feed, made, turns


KILL, CRASH, END = WorkerLost("killed"), WorkerLost("crashed", blame=True), VideoEnded(1, 0.0)


@pytest.mark.parametrize(
    ("answers", "last"),
    [
        ([KILL, KILL, KILL, KILL, END], VideoEnded),
        ([CRASH, KILL, KILL, KILL, KILL, END], VideoEnded),  # one crash, and nothing that counts with it
        ([KILL, CRASH, KILL, CRASH], Reject),
        ([KILL, KILL, KILL, KILL, KILL], WorkerLost),
        ([CRASH, KILL, KILL, KILL, KILL, KILL], WorkerLost),
    ],
)
def test_crashes_reject_a_video_and_kills_from_outside_never_do(answers, last):
    _, lanes, turns = scripted({"k": list(answers)})
    *before, event = turns(40)
    assert type(event.what) is last
    assert [type(e.what) for e in before] == [Restarted] * (len(answers) - 1)
    assert lanes.restarts == sum(isinstance(answer, WorkerLost) for answer in answers)
    if last is WorkerLost:
        assert not event.what.blame
        assert f"{OUTSIDE_KILLS} decoders were lost on k" in event.what.message
    if last is Reject:
        assert (event.what.reason, event.what.message) == ("decoder_crashed", "crashed, 2 times")


def test_a_video_whose_decoders_are_killed_waits_while_others_go_on():
    _, _, turns = scripted({"bad": [KILL] * 5, "a": [END], "b": [END]}, keys=("bad", "a", "b"))
    ended = [event.sample.key for event in turns(40) if not isinstance(event.what, Restarted)]
    assert ended == ["a", "b", "bad"]


@pytest.mark.parametrize(
    "error",
    [
        StorageUnavailable("ESTALE"),
        SourceChanged("gone"),
        SourceRefused("EACCES"),
        LatheError("anything that is neither damage nor a lost worker"),
    ],
)
def test_error_that_is_not_the_videos_fault_goes_to_its_owner(error):
    _, lanes, turns = scripted({"k": [error], "next": [END]}, keys=("k", "next"))
    first, second = turns(4)
    assert (first.owner, first.sample.key) == ("owner", "k")
    assert first.what.message.endswith(error.message)
    assert not isinstance(first.what, WorkerLost | Reject)
    assert second.sample.key == "next"
    assert lanes.restarts == 0


def test_lost_temporary_copy_is_storage_unavailable_and_a_lost_source_is_source_changed():
    feed, _, turns = scripted({"copy": [SourceChanged("gone")], "own": [SourceChanged("gone")]}, keys=())
    feed._source.items = [
        ("o", Sample("copy", 0, "s3://b/k.tar", "/tmp/lathe-scratch-1/x", "mp4")),
        ("o", Sample("own", 1, "/videos/a.mp4", "/videos/a.mp4", "mp4")),
    ]
    assert [type(event.what) for event in turns(4)] == [StorageUnavailable, SourceChanged]


def test_time_limit_does_not_run_while_a_video_is_sent():
    _, lanes, turns = scripted({})
    lanes.arriving.add(0)
    assert turns(1000) == []
    lanes.arriving.clear()
    assert [type(event.what) for event in turns(130)] == [Restarted]


def test_hang_in_a_read_is_storage_unavailable_and_hang_in_the_codec_a_reject():
    _, lanes, turns = scripted({"next": [END]}, keys=("k", "next"))
    lanes.in_a_read.add(0)
    (event, ended) = turns(130)
    assert (type(event.what), event.sample.key, ended.sample.key) == (StorageUnavailable, "k", "next")
    assert "decode.timeout_s" in event.what.message
    assert lanes.restarts == 1
    _, lanes, turns = scripted({})
    assert [type(event.what) for event in turns(260)] == [Restarted, Reject]


@pytest.mark.parametrize(("turns_in_a_read", "meaning"), [(20, Restarted), (100, StorageUnavailable)])
def test_time_spent_in_reads_decides_not_the_state_at_the_limit(turns_in_a_read, meaning):
    _, lanes, turns = scripted({})
    assert turns(120 - turns_in_a_read) == []
    lanes.in_a_read.add(0)
    assert turns(turns_in_a_read - 1) == []
    if meaning is StorageUnavailable:
        lanes.in_a_read.clear()  # between two slow reads
    assert [type(event.what) for event in turns(5)] == [meaning]


def test_a_decoder_that_hangs_before_it_is_up_is_replaced_and_the_build_stops_when_none_comes_up():
    feed, lanes, turns = scripted({})
    lanes.start_limit_s, lanes.answers = 120.0, []
    assert turns(119) == []
    assert lanes.restarts == 0
    assert turns(5) == []
    assert lanes.restarts == 1
    lanes.restart = lambda lane: None
    feed._restart(0)
    with pytest.raises(BuildError, match=r"not up 120 s after its start"):
        turns(1000)

"""Rules of the dispatcher about lost and draining workers, videos that end workers, and nodes. On plain values without Ray."""

import pytest

from pipeline.engine.driver.blamed_videos import MOST_DROPPED
from pipeline.engine.driver.dispatch import EXCUSED, Dispatcher
from pipeline.engine.driver.draining import finishes_in_time
from pipeline.engine.worker.blamed_video import StepVideo
from pipeline.errors import StorageUnavailable, WorkerLost
from tests.engine.test_dispatch import given_names, shards

POISON = StepVideo("id0", "s0.tar", "poison")
INNOCENT = StepVideo("id0", "s0.tar", "innocent")


def test_video_that_ends_two_workers_is_dropped_before_its_shard_is_given_up():
    d = Dispatcher(shards(1), credit=1, attempts=2)
    d.add_worker("a", "n1")
    assert [a.blamed for a in d.assignments(0)] == [()]
    ((_, first),) = d.on_lost("a", WorkerLost("segfault"), 0, step=(POISON, INNOCENT))
    assert first.retry
    d.add_worker("b", "n2")
    (second,) = d.assignments(1)
    assert [(v.key, v.deaths, v.drop) for v in second.blamed] == [("poison", 1, False), ("innocent", 1, False)]
    ((_, verdict),) = d.on_lost("b", WorkerLost("segfault"), 1, step=(POISON,))  # in a step of its own by now
    assert verdict.retry
    assert "video poison ended several workers and is rejected" in verdict.reason
    d.add_worker("c", "n1")
    (third,) = d.assignments(2)
    assert [(v.key, v.drop) for v in third.blamed] == [("poison", True), ("innocent", False)]
    assert "segfault" in third.blamed[0].why
    assert d.on_done("c", "id0", 3)
    assert d.finished
    assert not d.given_up


def test_two_videos_that_were_only_ever_in_one_step_are_not_dropped():
    d = Dispatcher(shards(1), credit=1, attempts=3)
    for n in range(2):
        d.add_worker(f"w{n}")
        d.assignments(n)
        d.on_lost(f"w{n}", WorkerLost("segfault"), n, step=(POISON, INNOCENT))
    d.add_worker("c")
    assert not any(video.drop for video in d.assignments(3)[0].blamed)


def test_deaths_on_a_node_that_is_avoided_blame_no_video():
    d = Dispatcher(shards(1), credit=1, attempts=9)
    for n in range(2):
        d.add_worker(f"w{n}", "sick")
        d.assignments(n)
        d.on_lost(f"w{n}", WorkerLost("CUDA error"), n, step=(POISON,))
    d.node_avoided("sick")
    d.add_worker("c", "well")
    assert d.assignments(3)[0].blamed == ()


@pytest.mark.parametrize("videos", [MOST_DROPPED, MOST_DROPPED + 3])
def test_shard_that_ends_workers_with_one_video_after_another_is_given_up(videos):
    d = Dispatcher(shards(1), credit=1, attempts=2)
    for n in range(2 * videos):
        if d.finished:
            break
        d.add_worker(f"w{n}")
        d.assignments(n)
        d.on_lost(f"w{n}", WorkerLost("segfault"), n, step=(StepVideo("id0", "s0.tar", str(n // 2)),))
    assert "failed 2 times" in d.given_up["id0"]
    assert n < 2 * MOST_DROPPED + 4


def test_kills_from_outside_count_as_no_attempt_up_to_a_limit_and_their_shards_run_alone():
    d = Dispatcher(shards(1, 1), credit=2, attempts=2)
    for n in range(EXCUSED):
        d.add_worker(f"w{n}")
        assert len(d.assignments(n)) == (2 if n == 0 else 1)
        assert all("not counted" in v.reason for _, v in d.on_lost(f"w{n}", WorkerLost("SIGKILL"), n, cause="killed"))
    assert not d.given_up


def test_suspect_is_tried_on_another_node_where_there_is_one():
    d = Dispatcher(shards(1), credit=1, attempts=3)
    d.add_worker("a", "n1")
    d.assignments(0)
    d.add_worker("same", "n1")
    d.add_worker("other", "n2")
    d.on_lost("a", WorkerLost("CUDA error"), 0)
    assert given_names(d.assignments(1)) == [("other", "s0")]
    d.on_lost("other", WorkerLost("CUDA error"), 1)
    assert given_names(d.assignments(2)) == [("same", "s0")]  # the only one left


@pytest.mark.parametrize("rests", [False, True])
def test_suspect_waits_for_a_busy_worker_on_another_node_and_not_for_one_that_cannot_take_it(rests):
    """The encoder that replaces the lost one on a sick node is up long before others have done their shards."""
    d = Dispatcher(shards(9, 8, 7, 6, 5), credit=2, attempts=3)
    d.add_worker("sick", "n1")
    d.add_worker("far", "n2")
    assert given_names(d.assignments(0)) == [("sick", "s0"), ("far", "s1"), ("sick", "s2"), ("far", "s3")]
    d.on_done("sick", "id2", 1)
    d.on_lost("sick", WorkerLost("CUDA error"), 2, step=(POISON,))
    d.add_worker("again", "n1")
    if rests:  # its temporary folder is full
        d.on_disk_failed("far", "id1", StorageUnavailable("no space left"), 3)
        assert ("again", "s0") in given_names(d.assignments(3))
        return
    assert given_names(d.assignments(3)) == [("again", "s4")]
    d.on_done("far", "id1", 4)
    assert d.assignments(4) == []  # it takes no other shard: the suspect runs alone
    d.on_done("far", "id3", 5)
    assert given_names(d.assignments(5)) == [("far", "s0")]


def test_slow_shard_is_copied_to_another_node_only():
    d = Dispatcher(shards(9, 1), credit=1, attempts=3)
    d.add_worker("slow", "n1")
    d.add_worker("same", "n1")
    d.assignments(0)
    d.on_done("same", "id1", 10)
    d.add_worker("far", "n2")
    (copy,) = d.assignments(50)
    assert (copy.worker, copy.shard.name) == ("far", "s0")  # although "same" has been idle for longer
    assert d.assignments(999) == []  # one copy at most


def test_slow_shard_waits_for_a_worker_on_another_node_unless_there_is_only_one_node():
    d = Dispatcher(shards(9, 8, 1), credit=1, attempts=3)
    for name, node in (("slow", "n1"), ("far", "n2"), ("same", "n1")):
        d.add_worker(name, node)
    assert given_names(d.assignments(0)) == [("slow", "s0"), ("far", "s1"), ("same", "s2")]
    d.on_done("same", "id2", 10)
    assert given_names(d.assignments(50)) == [
        ("same", "s1")
    ]  # that of the other node; its own node's shard is not copied here
    one = Dispatcher(shards(9, 1), credit=1, attempts=3)
    one.add_worker("slow", "n1")
    one.add_worker("same", "n1")
    one.assignments(0)
    one.on_done("same", "id1", 10)
    assert given_names(one.assignments(50)) == [("same", "s0")]


def test_draining_worker_finishes_what_is_nearly_done_and_hands_back_the_rest():
    d = Dispatcher(shards(3, 2, 1), credit=2, attempts=1)
    d.add_worker("a", "n1")
    d.assignments(0)
    assert d.on_draining("a", 60.0, 90.0, {"id0": 0.9, "id1": 0.1}.__getitem__) == [
        ("id1", "handed back: its node goes away in 60 s")
    ]
    assert d.assignments(90) == []  # it gets nothing more
    d.on_handed_back("a", "id1")
    assert d.assignments(91) == []
    d.add_worker("b", "n2")
    assert given_names(d.assignments(91)) == [("b", "s1"), ("b", "s2")]
    assert [shard_id for shard_id, _ in d.on_draining("a", 20.0, 130.0, lambda _: 0.95)] == ["id0"]
    d.on_handed_back("a", "id0")
    d.on_lost("a", WorkerLost("left"), 131.0, cause="preempted")
    assert not d.given_up
    assert d.open_shards == 3


@pytest.mark.parametrize(
    ("elapsed_s", "share", "typical_s", "left_s", "expected"),
    [
        (100, 0.5, None, 141, True),  # 100 s more, a quarter on top, and the margin
        (100, 0.5, None, 139, False),
        (10, 0.0, 100.0, 128, True),  # nothing done yet: as long as the others
        (10, 0.0, 100.0, 127, False),
        (1000, 0.0, 100.0, 22, True),
        (10, 0.0, None, 9999, False),  # nothing is known
        (10, 0.0, None, float("inf"), True),
    ],
)
def test_estimate_of_whether_an_attempt_ends_before_its_node(elapsed_s, share, typical_s, left_s, expected):
    assert finishes_in_time(elapsed_s, share, typical_s, left_s) == expected

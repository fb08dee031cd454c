"""The dispatcher decides on plain values, so every rule of it can be stated and tried without Ray."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.dispatch import MIN_EVIDENCE, Dispatcher, budget_exceeded
from pipeline.errors import OutputError, SourceChanged, StorageUnavailable, WorkerLost
from pipeline.records import Counts, Shard, SourceObject


def shards(*sizes):
    return [(f"id{n}", Shard("tar", f"s{n}", (SourceObject(f"s{n}.tar", size, "e"),))) for n, size in enumerate(sizes)]


def given_names(assignments):
    return [(a.worker, a.shard.name) for a in assignments]


def test_longest_first_and_every_worker_gets_one_before_anyone_gets_two():
    d = Dispatcher(shards(1, 5, 3, 4), credit=2, attempts=3)
    d.add_worker("a")
    d.add_worker("b")
    assert given_names(d.assignments(0)) == [("a", "s1"), ("b", "s3"), ("a", "s2"), ("b", "s0")]
    assert d.assignments(0) == []
    assert not d.finished


def test_a_failed_shard_is_tried_again_and_given_up_after_its_attempts():
    d = Dispatcher(shards(1), credit=1, attempts=2)
    d.add_worker("a")
    d.assignments(0)
    first = d.on_failed("a", "id0", StorageUnavailable("503"))
    assert first.retry
    assert "attempt 1 of 2" in first.reason
    assert given_names(d.assignments(1)) == [("a", "s0")]
    second = d.on_failed("a", "id0", StorageUnavailable("503"))
    assert not second.retry
    assert d.finished
    assert "failed 2 times" in d.given_up["id0"]
    assert (d.open_shards, d.open_bytes) == (0, 0)


@pytest.mark.parametrize("error", [SourceChanged("replaced"), OutputError("full")])
def test_what_cannot_get_better_is_not_tried_again(error):
    d = Dispatcher(shards(1), credit=1, attempts=5)
    d.add_worker("a")
    d.assignments(0)
    assert not d.on_failed("a", "id0", error).retry
    assert d.finished


def test_a_lost_worker_gives_its_shards_back_and_preemption_costs_no_attempt():
    d = Dispatcher(shards(2, 1), credit=2, attempts=1)
    d.add_worker("a")
    d.assignments(0)
    verdicts = d.on_lost("a", WorkerLost("spot"), preempted=True)
    assert [(i, v.retry) for i, v in verdicts] == [("id0", True), ("id1", True)]
    d.add_worker("b")
    assert {name for _, name in given_names(d.assignments(1))} == {"s0", "s1"}
    verdicts = d.on_lost("b", WorkerLost("segfault"), preempted=False)
    assert all(not v.retry for _, v in verdicts)
    assert set(d.given_up) == {"id0", "id1"}


def test_the_tail_is_copied_to_an_idle_worker_and_the_first_copy_counts_once():
    d = Dispatcher(shards(9, 1), credit=1, attempts=3)
    d.add_worker("a-slow")
    d.add_worker("b-fast")
    d.assignments(0)
    assert d.on_done("b-fast", "id1", 10)
    assert d.assignments(15) == []  # not yet twice the median
    (copy,) = d.assignments(21)
    assert (copy.worker, copy.shard.name) == ("b-fast", "s0")
    assert "copy" in copy.reason
    assert d.assignments(99) == []  # one copy at most
    assert d.on_done("b-fast", "id0", 30)
    assert d.finished  # nobody waits for the slow copy
    assert not d.on_done("a-slow", "id0", 40)
    assert not d.on_failed("a-slow", "id0", WorkerLost("late")).retry


def test_draining_hands_out_nothing_more():
    d = Dispatcher(shards(2, 1), credit=1, attempts=3)
    d.add_worker("a")
    d.assignments(0)
    d.draining = True
    d.on_done("a", "id0", 1)
    assert d.assignments(2) == []
    assert d.finished
    assert d.open_shards == 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_happens_every_shard_ends_done_or_given_up_exactly_once(data):
    n = data.draw(st.integers(1, 8))
    d = Dispatcher(shards(*range(1, n + 1)), credit=data.draw(st.integers(1, 3)), attempts=data.draw(st.integers(1, 3)))
    running, firsts, workers, now = set(), [], 0, 0.0
    for _ in range(400):
        if d.finished:
            break
        now += 1
        if not d._workers:
            workers += 1
            d.add_worker(f"w{workers}")
        for a in d.assignments(now):
            shard_id = f"id{a.shard.name[1:]}"
            assert (a.worker, shard_id) not in running
            running.add((a.worker, shard_id))
        assert running, "nothing runs and yet it is not finished"
        worker, shard_id = data.draw(st.sampled_from(sorted(running)))
        event = data.draw(st.sampled_from(["done", "done", "fail", "lost"]))
        if event == "lost":
            d.on_lost(worker, WorkerLost("x"), preempted=data.draw(st.booleans()))
            running = {r for r in running if r[0] != worker}
            continue
        running.discard((worker, shard_id))
        if event == "fail":
            d.on_failed(worker, shard_id, StorageUnavailable("x"))
        elif d.on_done(worker, shard_id, now):
            firsts.append(shard_id)
    else:
        pytest.fail("the build never finished")
    assert len(firsts) == len(set(firsts))
    assert set(firsts) | set(d.given_up) == {f"id{i}" for i in range(n)}
    assert not set(firsts) & set(d.given_up)
    assert (d.open_shards, d.open_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("samples", "damaged", "budget", "final", "stops"),
    [
        (6, 1, 0.05, True, False),  # one broken file is no flood
        (6, 1, 0.0, True, True),
        (6, 2, 0.05, True, True),
        (1000, 50, 0.05, True, False),
        (1000, 51, 0.05, True, True),
        (10, 5, 0.05, False, False),  # too little evidence to stop a running build
        (10, 6, 0.05, False, True),  # already more than 5 % of MIN_EVIDENCE
        (1000, 51, 0.05, False, True),
        (0, 1, 0.05, True, False),
    ],
)
def test_reject_budget(samples, damaged, budget, final, stops):
    assert MIN_EVIDENCE == 100
    over = budget_exceeded(Counts(samples=samples, damaged=damaged), budget, final=final)
    assert (over is not None) == stops
    if over:
        assert f"{damaged} of {samples}" in over
        assert "reject_budget" in over

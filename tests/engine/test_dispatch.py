"""Rules of the dispatcher, tested on plain values without Ray."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.driver.dispatch import EXCUSED, PAUSE_S, Dispatcher
from pipeline.engine.driver.running_median import RunningMedian
from pipeline.errors import OutputError, SourceChanged, SourceRefused, StorageUnavailable, WorkerLost
from pipeline.records import Shard, SourceObject


def shards(*sizes):
    return [(f"id{n}", Shard("tar", f"s{n}", (SourceObject(f"s{n}.tar", size, "e"),))) for n, size in enumerate(sizes)]


def given_names(assignments):
    return [(a.worker, a.shard.name) for a in assignments]


def test_largest_shards_go_first_and_every_worker_gets_one_before_a_second():
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
    first = d.on_failed("a", "id0", StorageUnavailable("503"), 0)
    assert first.retry
    assert "attempt 1 of 2" in first.reason
    assert d.assignments(PAUSE_S / 2) == []  # storage gets a pause
    assert not d.finished
    assert given_names(d.assignments(PAUSE_S)) == [("a", "s0")]
    second = d.on_failed("a", "id0", StorageUnavailable("503"), 2)
    assert not second.retry
    assert d.finished
    assert "failed 2 times" in d.given_up["id0"]
    assert (d.open_shards, d.open_bytes) == (0, 0)


@pytest.mark.parametrize("error", [SourceChanged("replaced"), SourceRefused("403"), OutputError("full")])
def test_permanent_errors_are_not_tried_again(error):
    d = Dispatcher(shards(1), credit=1, attempts=5)
    d.add_worker("a")
    d.assignments(0)
    assert not d.on_failed("a", "id0", error, 0).retry
    assert d.finished


def test_preemption_counts_as_no_attempt():
    d = Dispatcher(shards(2, 1), credit=2, attempts=1)
    for n in range(20):
        d.add_worker(f"w{n}")
        assert {name for _, name in given_names(d.assignments(n))} == {"s0", "s1"}
        verdicts = d.on_lost(f"w{n}", WorkerLost("spot"), n, cause="preempted")
        assert [(i, v.retry) for i, v in verdicts] == [("id0", True), ("id1", True)]
    assert not d.given_up


def test_dead_node_counts_as_no_attempt_up_to_a_limit():
    d = Dispatcher(shards(1), credit=1, attempts=2)
    for n in range(EXCUSED + 2):
        assert not d.given_up
        d.add_worker(f"w{n}")
        d.assignments(n)
        d.on_lost(f"w{n}", WorkerLost("its node died"), n, cause="node")
    assert "failed 2 times" in d.given_up["id0"]


def test_shards_of_a_lost_worker_run_alone_and_only_a_lone_shard_is_counted():
    d = Dispatcher(shards(3, 2, 1), credit=3, attempts=1)
    d.add_worker("a")
    assert len(d.assignments(0)) == 3
    assert all(v.retry for _, v in d.on_lost("a", WorkerLost("segfault"), 0))
    d.add_worker("b")
    for n, name in enumerate(("s0", "s1", "s2")):
        assert given_names(d.assignments(n)) == [("b", name)]  # alone, with any credit
        if n == 1:
            ((_, verdict),) = d.on_lost("b", WorkerLost("segfault"), n)
            assert not verdict.retry
            d.add_worker("b")
        else:
            assert d.on_done("b", f"id{n}", n)
    assert d.finished
    assert set(d.given_up) == {"id1"}


def test_suspect_gets_a_worker_for_itself_although_all_are_busy():
    d = Dispatcher(shards(9, 8, *[1] * 20), credit=2, attempts=3)
    d.add_worker("a")
    d.assignments(0)
    d.add_worker("b")
    d.assignments(0)
    d.on_lost("a", WorkerLost("segfault"), 0)  # held s0 and s1
    d.add_worker("c")
    assert given_names(d.assignments(1)) == [("c", "s0")]
    assert d.assignments(1) == []  # b is emptied for s1, c holds a suspect
    for shard_id in d._workers.held("b"):
        d.on_done("b", shard_id, 2)
    assert given_names(d.assignments(2)) == [("b", "s1")]
    d.on_done("b", "id1", 3)
    assert len(d.assignments(3)) == 2  # and takes its share again


def test_suspect_is_not_copied_to_a_second_worker():
    d = Dispatcher(shards(9, 1, 1), credit=2, attempts=3)
    d.add_worker("a")
    d.assignments(0)
    d.add_worker("b")
    d.assignments(0)
    d.on_done("b", "id1", 1)
    d.on_lost("a", WorkerLost("segfault"), 1)
    for _ in range(3):
        d.add_worker("c")
        d.assignments(2)
    d.add_worker("idle")
    assert d.assignments(1000) == []


def test_parked_shard_is_neither_counted_nor_lost():
    d = Dispatcher(shards(2, 1), credit=1, attempts=1)
    d.add_worker("a")
    d.assignments(5)
    assert d.park("a", "id0") == 5
    d.paused = True
    assert d.assignments(6) == []
    assert not d.finished
    d.paused = False
    d.release("id0")
    assert given_names(d.assignments(7)) == [("a", "s1")]  # what has not failed comes first
    d.on_done("a", "id1", 7)
    assert given_names(d.assignments(7)) == [("a", "s0")]
    assert d.park("a", "id0") == 7
    assert not d.judge("id0", StorageUnavailable("503"), 8).retry
    assert "failed 1 times" in d.given_up["id0"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_shards_that_kill_workers_are_given_up(data):
    """Poison kills its worker whenever it runs, after any other events; it may run for any time before."""
    n, attempts = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    deadly = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    d = Dispatcher(shards(*[1] * n), credit=data.draw(st.integers(1, 4)), attempts=attempts)
    held: dict[str, list[str]] = {}
    deaths_alone = dict.fromkeys((f"id{p}" for p in deadly), 0)
    created, now, done = 0, 0.0, set()
    for _ in range(2000):
        if d.finished:
            break
        now += data.draw(st.sampled_from([1, 1, 1, 50]))
        while len(held) < 3:
            created += 1
            held[f"w{created}"] = []
            d.add_worker(f"w{created}")
        for a in d.assignments(now):
            held[a.worker].append(f"id{a.shard.name[1:]}")
        worker = data.draw(st.sampled_from(sorted(w for w in held if held[w])))
        killers = [s for s in held[worker] if s in deaths_alone]
        innocents = [s for s in held[worker] if s not in deaths_alone]
        if killers and (not innocents or data.draw(st.booleans())):
            for shard_id in held[worker]:
                if len(held[worker]) == 1:
                    deaths_alone[shard_id] += 1
            del held[worker]
            d.on_lost(worker, WorkerLost("killed"), now)
        else:
            shard_id = data.draw(st.sampled_from(innocents))
            held[worker].remove(shard_id)
            d.on_done(worker, shard_id, now)
            done.add(shard_id)
    else:
        pytest.fail("the build never finished")
    assert set(d.given_up) == set(deaths_alone)
    assert done == {f"id{i}" for i in range(n)} - set(deaths_alone)
    assert all(count >= attempts for count in deaths_alone.values())
    assert (d.open_shards, d.open_bytes) == (0, 0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_running_median_is_the_median(values):
    running = RunningMedian()
    assert running.value is None
    for value in values:
        running.add(value)
    assert running.value == pytest.approx(statistics.median(values))


def test_slow_shard_is_copied_to_an_idle_worker_and_counts_once():
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
    assert d.finished  # the slow copy is not waited for
    assert not d.on_done("a-slow", "id0", 40)
    assert not d.on_failed("a-slow", "id0", WorkerLost("late"), 50).retry


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
def test_every_shard_ends_done_or_given_up_exactly_once(data):
    n = data.draw(st.integers(1, 8))
    d = Dispatcher(shards(*range(1, n + 1)), credit=data.draw(st.integers(1, 3)), attempts=data.draw(st.integers(1, 3)))
    running, firsts, workers, now = set(), [], 0, 0.0
    for _ in range(400):
        if d.finished:
            break
        now += 1
        if not d._workers._held:
            workers += 1
            d.add_worker(f"w{workers}")
        for a in d.assignments(now):
            shard_id = f"id{a.shard.name[1:]}"
            assert (a.worker, shard_id) not in running
            running.add((a.worker, shard_id))
        if not running:  # what is left waits out its pause
            assert d._delayed
            continue
        worker, shard_id = data.draw(st.sampled_from(sorted(running)))
        event = data.draw(st.sampled_from(["done", "done", "fail", "lost"]))
        if event == "lost":
            d.on_lost(
                worker,
                WorkerLost("x"),
                now,
                cause=data.draw(st.sampled_from(["unexplained", "killed", "node", "preempted"])),
            )
            running = {r for r in running if r[0] != worker}
            continue
        running.discard((worker, shard_id))
        if event == "fail":
            error = data.draw(st.sampled_from([StorageUnavailable("x"), WorkerLost("decoders")]))
            d.on_failed(worker, shard_id, error, now)
        elif d.on_done(worker, shard_id, now):
            firsts.append(shard_id)
    else:
        pytest.fail("the build never finished")
    assert len(firsts) == len(set(firsts))
    assert set(firsts) | set(d.given_up) == {f"id{i}" for i in range(n)}
    assert not set(firsts) & set(d.given_up)
    assert (d.open_shards, d.open_bytes) == (0, 0)


def test_canaries_are_the_smallest_shards_that_have_not_failed():
    d = Dispatcher(shards(9, 8, 3, 2, 1), credit=2, attempts=3)
    for name in "abc":
        d.add_worker(name)
    d.canaries_only = True
    assert [name for _, name in given_names(d.assignments(0))] == ["s4", "s3"]
    assert d.assignments(1) == []
    d.park("a", "id4")
    assert [name for _, name in given_names(d.assignments(2))] == ["s2"]
    assert d.fresh
    d.canaries_only = False
    d.release("id4")
    assert [name for _, name in given_names(d.assignments(3))] == [
        "s0",
        "s1",
        "s4",
    ]  # behind those that have not failed


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_worker_with_a_full_disk_fails_no_shard_and_gets_few(data):
    """Virtual time: it fails at once what the others need a minute for."""
    n, healthy = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    d = Dispatcher(shards(*[1] * n), credit=data.draw(st.integers(1, 2)), attempts=1)
    for worker in ["full", *(f"w{k}" for k in range(healthy))]:
        d.add_worker(worker)
    now, on_full, running = 0.0, 0, []
    while not d.finished:
        for a in d.assignments(now):
            shard_id = f"id{a.shard.name[1:]}"
            if a.worker == "full":
                on_full += 1
                d.on_disk_failed("full", shard_id, StorageUnavailable("full"), now)
            else:
                running.append((now + data.draw(st.integers(30, 90)), a.worker, shard_id))
        now += 1.0
        for item in sorted(item for item in running if item[0] <= now):
            running.remove(item)
            d.on_done(item[1], item[2], now)
    assert not d.given_up
    assert on_full <= 8 + now / 60 * 2

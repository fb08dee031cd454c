"""A store that is away pauses the build and no failure counts; a single object that fails fails its own shard only.

Uses `ScriptedPool` over a real local store with a scripted `probe`; a real outage is in test_s3_outage.py.
"""

import re
import threading
import time
from dataclasses import replace

import pytest

from pipeline.cli.wording import build_lines
from pipeline.engine.driver import outage
from pipeline.engine.driver.encode import _run
from pipeline.engine.worker.pool import ShardEnded
from pipeline.errors import BuildError, RejectBudgetExceeded, StorageUnavailable, WorkerLost
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build, unavailable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("pipeline.engine.driver.dispatch.PAUSE_S", 0.02)


def test_an_outage_pauses_the_build_and_counts_against_no_shard(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    ends_at = None

    def outcome(shard, run):
        nonlocal ends_at
        if ends_at is None:  # the first attempt finds the store away, for longer than any number of attempts
            store.down, ends_at = True, time.monotonic() + 1.0
            threading.Timer(1.0, lambda: setattr(store, "down", False)).start()
        return unavailable(shard) if store.down else None

    pool = ScriptedPool(outcome)
    build, report, notices = make_build(tmp_path, store, pool, "engine.attempts=1")
    build.run()
    assert report.ok
    assert not report.failed
    away = [line for line in notices if "has not answered since" in line]
    assert len(away) == 1
    assert re.search(r"since \d\d:\d\d:\d\d \(host:9000 did not answer \(ConnectionRefused\)\)", away[0])
    assert "nothing is given up" in away[0]
    assert len([line for line in notices if "answers again" in line]) == 1
    assert len(notices) == 2
    assert store.probes > 5
    assert store.thread_names == {"probe"}  # never the scheduling thread
    assert max(pool.runs.values()) <= 3  # it did not hand out while it waited


def test_failing_object_fails_its_own_shard_only(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    pool = ScriptedPool(lambda shard, run: unavailable(shard) if shard.name == "s3" else None)
    build, report, notices = make_build(tmp_path, store, pool)
    build.run()
    assert set(report.failed) == {"s3"}
    assert (report.shards_done, pool.runs["s3"]) == (5, 3)
    assert not [line for line in notices if "waiting" in line]


def test_store_that_answers_probes_but_fails_every_shard_is_an_outage(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    pool = ScriptedPool(lambda shard, run: unavailable(shard) if store.probes < 8 else None)
    build, report, notices = make_build(tmp_path, store, pool, "engine.attempts=2", shards=100)
    build.run()
    assert report.ok
    assert max(pool.runs.values()) == 2  # no shard was tried again before one had succeeded
    assert len([line for line in notices if "in a row failed" in line]) == 1


def test_a_failure_that_began_before_the_end_of_the_outage_does_not_count(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    watch = outage.OutageWatch(store, lambda root: store, 100.0)

    def settle(now):
        for _ in range(1000):
            rulings, _ = watch.poll(now, fresh=lambda: True)
            if rulings or watch._probe is None:
                return rulings
            time.sleep(0.002)
        raise AssertionError("no answer of the probe")

    error = StorageUnavailable("away")
    store.down = True
    watch.failed("a", error, 0.0, 10.0)
    watch.poll(10.0, fresh=lambda: True)
    settle(10.0)
    assert watch.paused
    store.down = False
    watch.poll(11.0, fresh=lambda: True)
    assert [(r.shard_id, r.counts) for r in settle(11.0)] == [("a", False)]
    assert not watch.paused
    watch.failed("b", error, 9.0, 12.0)  # its attempt saw the outage
    watch.poll(12.0, fresh=lambda: True)
    assert [(r.shard_id, r.counts) for r in settle(12.0)] == [("b", False)]
    watch.failed("c", error, 12.5, 13.0)
    watch.poll(13.0, fresh=lambda: True)
    assert [(r.shard_id, r.counts) for r in settle(13.0)] == [("c", True)]


def test_an_outage_longer_than_outage_s_ends_the_build_with_one_line_and_its_report(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))

    def outcome(shard, run):
        store.down = shard.name != "s5"  # the first shard is done
        return unavailable(shard) if store.down else None

    pool = ScriptedPool(outcome, workers=1)
    build, report, _ = make_build(tmp_path, store, pool, "engine.outage_s=0.3", "engine.credit=1")
    with pytest.raises(
        BuildError, match=r"storage has failed since .* engine.outage_s=0.3.*the same command resumes"
    ) as caught:
        build.run()
    assert caught.value.exit_code == 1
    assert caught.value.report is report
    assert report.shards_done == 1
    assert not report.failed
    assert pool.closed


def test_a_build_that_an_outage_ends_says_so_though_its_files_cannot_be_named_either(tmp_path):
    class Away(ProbedStore):
        def exists(self, key):
            if self.down:
                raise StorageUnavailable("host:9000 did not answer", uri=self.root)
            return super().exists(key)

    def outcome(shard, run):
        store.down = True
        return unavailable(shard)

    store = Away(str(tmp_path / "out"))
    build, _, lines = make_build(tmp_path, store, ScriptedPool(outcome), "engine.outage_s=0.3")
    with pytest.raises(BuildError, match=r"engine\.outage_s"):
        _run(build, build._observer._context, store, build._display)
    assert "may not name the new data files: " in lines[-1]


@pytest.mark.parametrize("ending", [BuildError("no encoder is up"), RejectBudgetExceeded("flood"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["start", "poll"])
def test_every_error_of_a_build_has_its_report_attached(tmp_path, ending, moment, monkeypatch):
    pool = ScriptedPool(lambda shard, run: None)

    def end(*_):
        raise ending

    monkeypatch.setattr(pool, moment, end)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool)
    with pytest.raises(type(ending)) as caught:
        build.run()
    assert caught.value.report is report
    assert report.wall_s > 0
    assert pool.closed


def test_repeated_reasons_are_counted_not_shown_again(tmp_path):
    pool = ScriptedPool(lambda shard, run: WorkerLost(f"decoder {run} of {shard.name} is /gone/{run}"))
    build, report, notices = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool, shards=12)
    build.run()
    assert len(report.failed) == 12
    assert len(notices) < 8
    assert [line for line in notices if "and 11 more shards" in line]
    assert len([line for line in build_lines(report) if "  failed" in line]) == 11
    assert "… and 2 more" in build_lines(report)[-3]


class Rewriting(ScriptedPool):
    """Changes results on their way to the build."""

    def __init__(self, **changes):
        super().__init__(lambda shard, run: None)
        self._changes = changes

    def poll(self, timeout_s):
        events = super().poll(timeout_s)
        for n, event in enumerate(events):
            if isinstance(event, ShardEnded):
                changes = {name: value(event.outcome) for name, value in self._changes.items()}
                events[n] = ShardEnded(event.worker, replace(event.outcome, **changes))
        return events


def test_shards_of_another_build_are_not_counted_as_encoded(tmp_path):
    seen = []
    pool = Rewriting(ours=lambda outcome: seen.append(outcome) or len(seen) > 4)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool)
    build.run()
    assert report.ok
    assert (report.shards_done, report.shards_elsewhere, report.counts.samples) == (2, 4, 2)
    assert "  4 of 6 shards committed by another build that ran at the same time" in build_lines(report)


def test_refused_inputs_and_notes_are_shown_and_the_build_is_not_ok(tmp_path):
    pool = Rewriting(notes=lambda _: ("a note",), refused=lambda _: ("x.mp4: 403",))
    build, report, notices = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool, shards=1)
    build.run()
    assert notices == ["s0: a note"]
    assert not report.ok
    assert "  failed    x.mp4: 403" in build_lines(report)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("sick", [3, 6])
def test_unreadable_shards_are_named_and_the_others_are_encoded(tmp_path, workers, largest, sick):
    """The store answers probes. Shards are handed out by size, so the unreadable ones come first or last."""
    names = {f"s{n}" for n in (range(15 - sick, 15) if largest else range(sick))}
    pool = ScriptedPool(lambda shard, run: unavailable(shard) if shard.name in names else None, workers)
    store = ProbedStore(str(tmp_path / "out"))
    build, report, _ = make_build(tmp_path, store, pool, "engine.outage_s=60", shards=15)
    build.run()
    assert set(report.failed) == names
    assert report.shards_done == 15 - sick
    assert max(pool.runs.values()) <= 4


def test_success_during_a_pause_ends_the_doubt(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    watch = outage.OutageWatch(store, lambda root: store, 100.0)

    def settle(now):
        for _ in range(1000):
            rulings, _ = watch.poll(now, fresh=lambda: True)
            if rulings or (watch._probe is None and not watch._parked):
                return rulings
            time.sleep(0.002)
        raise AssertionError("no answer of the probe")

    for n in range(outage.MANY):
        watch.failed(f"s{n}", StorageUnavailable("no", uri="x"), 0.0, 1.0)
    settle(1.0)
    assert (watch.doubtful, watch.paused) == (True, False)
    watch.failed("canary", StorageUnavailable("no", uri="x"), 1.0, 2.0)
    settle(2.0)
    assert (watch.doubtful, watch.paused) == (True, True)
    watch.succeeded()
    assert (watch.doubtful, watch.paused) == (False, False)
    rulings, _ = watch.poll(2.0, fresh=lambda: True)
    assert {(ruling.shard_id, ruling.counts) for ruling in rulings} == {
        *((f"s{n}", True) for n in range(outage.MANY)),
        ("canary", True),
    }


def test_failures_held_in_doubt_do_not_count_once_the_store_is_away(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))

    def outcome(shard, run):
        runs = sum(pool.runs.values())
        if runs == 8:  # until then it answers probes
            store.down = True
            threading.Timer(0.3, lambda: setattr(store, "down", False)).start()
        return unavailable(shard) if runs <= 8 or store.down else None

    pool = ScriptedPool(outcome)
    build, report, notices = make_build(tmp_path, store, pool, "engine.attempts=1", shards=20)
    build.run()
    assert report.ok
    assert [line for line in notices if "answers again" in line]


def test_unanswered_probe_is_an_outage(tmp_path, monkeypatch):
    monkeypatch.setattr(outage, "PROBE_S", 0.05)
    store = ProbedStore(str(tmp_path / "out"))
    monkeypatch.setattr(store, "probe", threading.Event().wait)
    pool = ScriptedPool(lambda shard, run: unavailable(shard))
    build, report, notices = make_build(tmp_path, store, pool, "engine.outage_s=0.3")
    with pytest.raises(BuildError, match=r"engine.outage_s=0.3: a probe of .* has not been answered"):
        build.run()
    assert not report.failed
    assert len([line for line in notices if "has not answered since" in line]) == 1
    assert len([thread for thread in threading.enumerate() if thread.name == "probe"]) <= 2


def test_repeated_failure_of_one_shard_is_not_counted_as_more_shards(tmp_path):
    pool = ScriptedPool(lambda shard, run: WorkerLost("decoder lost") if shard.name == "s1" else None)
    build, report, notices = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool)
    build.run()
    assert set(report.failed) == {"s1"}
    assert not [line for line in notices if "more shard" in line]

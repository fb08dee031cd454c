"""A store that is away for everybody pauses the build and costs no shard an attempt; an object that fails alone costs its own shard.

Driven by a crew of plain objects over a real local store whose `probe` says what the test wants; a real outage is in test_s3_outage.py.
"""

import re
import threading
import time
from dataclasses import replace

import pytest

from pipeline.engine import outage
from pipeline.engine.blueprint import Blueprint
from pipeline.engine.build import Build
from pipeline.engine.crew import ShardEnded, WorkerUp
from pipeline.engine.encode_loop import ShardFailure
from pipeline.engine.shard_result import ShardResult
from pipeline.errors import BuildError, RejectBudgetExceeded, StorageUnavailable, WorkerLost
from pipeline.progress import Silent
from pipeline.records import Counts, Shard, SourceObject, Timings
from pipeline.report import BuildReport
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import tiny_job


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("pipeline.engine.dispatch.PAUSE_S", 0.02)


class Told(Silent):
    def __init__(self):
        self.lines = []

    def notice(self, text):
        self.lines.append(text)


class ProbedStore(LocalStore):
    """Answers probes unless it is down."""

    def __init__(self, root):
        super().__init__(root)
        self.down = False
        self.probes = 0
        self.thread_names = set()

    def probe(self):
        self.probes += 1
        self.thread_names.add(threading.current_thread().name)
        if self.down:
            raise StorageUnavailable("host:9000 did not answer (ConnectionRefused)", uri=self.root)


class ScriptedCrew:
    """Workers whose attempts end as `outcome(shard, how often it ran)` says: None for success, else an error."""

    def __init__(self, outcome, workers=2):
        self.size = workers
        self._outcome = outcome
        self._events = []
        self.runs = {}
        self.closed = False

    def start(self, wanted):
        self._events += [WorkerUp(f"w{n}") for n in range(wanted)]

    def assign(self, worker, shard):
        self.runs[shard.name] = self.runs.get(shard.name, 0) + 1
        error = self._outcome(shard, self.runs[shard.name])
        shard_id = shard.id("f" * 32)
        counts = Counts(samples=1, encoded=1, clips=1, frames=5)
        done = ShardResult(shard_id, True, counts, counts, Timings(), 10, {}, 1)
        self._events.append(ShardEnded(worker, done if error is None else ShardFailure(shard_id, error)))

    def poll(self, timeout_s):
        if not self._events:
            time.sleep(0.005)
        events, self._events = self._events, []
        return events

    def close(self):
        self.closed = True


class ScriptedExecutor:
    def __init__(self, crew):
        self._crew = crew

    def crew(self, blueprint):
        return self._crew


def make_build(tmp_path, store, crew, *overrides, shards=6):
    job = tiny_job(tmp_path, tmp_path / "out", *overrides)
    blueprint = object.__new__(Blueprint)
    object.__setattr__(blueprint, "job", job)
    object.__setattr__(blueprint, "fingerprint", "f" * 32)
    uri = str(tmp_path / "in")
    todo = [Shard("tar", f"s{n}", (SourceObject(f"{uri}/s{n}.tar", n + 1, "e"),)) for n in range(shards)]
    report = BuildReport(str(tmp_path), "f" * 32, "leanvae", True, "cpu", shards, 0)
    told = Told()
    return Build(todo, blueprint, ScriptedExecutor(crew), store, told, report, time.monotonic()), report, told.lines


def unavailable(shard):
    return StorageUnavailable("host:9000 did not answer (ConnectionRefused)", uri=shard.objects[0].uri)


def test_an_outage_pauses_the_build_and_counts_against_no_shard(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    ends_at = None

    def outcome(shard, run):
        nonlocal ends_at
        if ends_at is None:  # the first attempt finds the store away, for longer than any number of attempts
            store.down, ends_at = True, time.monotonic() + 1.0
            threading.Timer(1.0, lambda: setattr(store, "down", False)).start()
        return unavailable(shard) if store.down else None

    crew = ScriptedCrew(outcome)
    build, report, told = make_build(tmp_path, store, crew, "engine.attempts=1")
    build.run()
    assert report.ok
    assert not report.failed
    away = [line for line in told if "has not answered since" in line]
    assert len(away) == 1
    assert re.search(r"since \d\d:\d\d:\d\d \(host:9000 did not answer \(ConnectionRefused\)\)", away[0])
    assert "nothing is given up" in away[0]
    assert len([line for line in told if "answers again" in line]) == 1
    assert len(told) == 2
    assert store.probes > 5
    assert store.thread_names == {"probe"}  # never the scheduling thread
    assert max(crew.runs.values()) <= 3  # it did not hand out while it waited


def test_one_sick_object_costs_its_own_shard_only(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    crew = ScriptedCrew(lambda shard, run: unavailable(shard) if shard.name == "s3" else None)
    build, report, told = make_build(tmp_path, store, crew)
    build.run()
    assert set(report.failed) == {"s3"}
    assert (report.shards_done, crew.runs["s3"]) == (5, 3)
    assert not [line for line in told if "waiting" in line]


def test_a_store_that_answers_probes_and_fails_every_shard_is_an_outage_too(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    crew = ScriptedCrew(lambda shard, run: unavailable(shard) if sum(crew.runs.values()) < 60 else None)
    build, report, told = make_build(tmp_path, store, crew)
    build.run()
    assert report.ok
    assert len([line for line in told if "in a row failed" in line]) == 1


def test_a_full_temporary_disk_pauses_and_says_so_once(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))

    def outcome(shard, run):
        full = f"spool folder {tmp_path}/lathe-scratch-{shard.name}{run} cannot be written: No space left on device; TMPDIR moves it"
        return StorageUnavailable(full, shard=shard.name) if sum(crew.runs.values()) < 200 else None

    crew = ScriptedCrew(outcome)
    build, report, told = make_build(tmp_path, store, crew, shards=12)
    build.run()
    assert report.ok
    assert len([line for line in told if "No space left" in line]) <= 3
    assert len(told) <= 6


def test_a_failure_that_began_before_the_end_of_the_outage_does_not_count(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))
    watch = outage.OutageWatch(store, lambda root: store, 100.0)

    def settle(now):
        for _ in range(1000):
            rulings, _ = watch.poll(now)
            if rulings or watch._probe is None:
                return rulings
            time.sleep(0.002)
        raise AssertionError("no answer of the probe")

    error = StorageUnavailable("away")
    store.down = True
    watch.failed("a", error, 0.0, 10.0)
    watch.poll(10.0)
    settle(10.0)
    assert watch.paused
    store.down = False
    watch.poll(11.0)
    assert [(r.shard_id, r.counts) for r in settle(11.0)] == [("a", False)]
    assert not watch.paused
    watch.failed("b", error, 9.0, 12.0)  # its attempt saw the outage
    watch.poll(12.0)
    assert [(r.shard_id, r.counts) for r in settle(12.0)] == [("b", False)]
    watch.failed("c", error, 12.5, 13.0)
    watch.poll(13.0)
    assert [(r.shard_id, r.counts) for r in settle(13.0)] == [("c", True)]


def test_an_outage_longer_than_outage_s_ends_the_build_with_one_line_and_its_report(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))

    def outcome(shard, run):
        store.down = shard.name != "s5"  # the first shard is done
        return unavailable(shard) if store.down else None

    crew = ScriptedCrew(outcome, workers=1)
    build, report, _ = make_build(tmp_path, store, crew, "engine.outage_s=0.3", "engine.credit=1")
    with pytest.raises(
        BuildError, match=r"storage has failed since .* engine.outage_s=0.3.*the same command resumes"
    ) as caught:
        build.run()
    assert caught.value.exit_code == 1
    assert caught.value.report is report
    assert report.shards_done == 1
    assert not report.failed
    assert crew.closed


@pytest.mark.parametrize("ending", [BuildError("no encoder is up"), RejectBudgetExceeded("flood"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["start", "poll"])
def test_whatever_ends_a_build_its_report_is_attached(tmp_path, ending, moment, monkeypatch):
    crew = ScriptedCrew(lambda shard, run: None)

    def end(*_):
        raise ending

    monkeypatch.setattr(crew, moment, end)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), crew)
    with pytest.raises(type(ending)) as caught:
        build.run()
    assert caught.value.report is report
    assert report.wall_s > 0
    assert crew.closed


def test_repeated_reasons_are_counted_not_repeated(tmp_path):
    crew = ScriptedCrew(lambda shard, run: WorkerLost(f"decoder {run} of {shard.name} is /gone/{run}"))
    build, report, told = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), crew, shards=12)
    build.run()
    assert len(report.failed) == 12
    assert len(told) < 8
    assert [line for line in told if "and 11 more shards" in line]
    assert len([line for line in report.lines() if "  failed" in line]) == 11
    assert "… and 2 more" in report.lines()[-3]


class Rewriting(ScriptedCrew):
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


def test_shards_of_another_build_are_not_claimed(tmp_path):
    seen = []
    crew = Rewriting(won=lambda outcome: seen.append(outcome) or len(seen) > 4)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), crew)
    build.run()
    assert report.ok
    assert (report.shards_done, report.shards_elsewhere, report.counts.samples) == (2, 4, 2)
    assert "  4 of 6 shards were committed by another build meanwhile" in report.lines()


def test_refused_inputs_and_notes_are_shown_and_the_build_is_not_ok(tmp_path):
    crew = Rewriting(notes=lambda _: ("a note",), refused=lambda _: ("x.mp4: 403",))
    build, report, told = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), crew, shards=1)
    build.run()
    assert told == ["s0: a note"]
    assert not report.ok
    assert "  failed    x.mp4: 403" in report.lines()

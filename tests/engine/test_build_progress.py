"""Progress of a build: it moves inside a shard, never exceeds the total, and counts no shard twice."""

from itertools import pairwise

import pytest

import pipeline
from pipeline.cli.progress import progress_line
from pipeline.engine.driver import build as build_module
from pipeline.engine.driver.live_counts import LiveCounts
from pipeline.engine.driver.progress import Silent
from pipeline.engine.worker import pool
from pipeline.engine.worker.pool import Pulse
from pipeline.engine.worker.shard_reading import ShardReading
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.errors import LatheError
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build
from tests.tiny_corpus import tiny_job, video_bytes


class Recorder(Silent):
    def __init__(self):
        self.seen = []

    def update(self, progress):
        self.seen.append(progress)

    @property
    def between(self):
        return [progress for progress in self.seen if 0 < progress.bytes_done < progress.bytes_total]


def test_a_build_of_one_shard_of_files_shows_percentages_between_0_and_100(tmp_path, monkeypatch):
    for n in range(4):
        (tmp_path / f"{n}.mp4").write_bytes(video_bytes(9, seed=n))
    display, patience = Recorder(), iter(range(20_000))
    next_sample = ShardReading.next_sample
    taken = []

    def third_sample_waits_for_the_display(reading):
        if len(taken) == 2 and not display.between and next(patience, None) is not None:
            return None
        sample = next_sample(reading)
        taken.extend([sample] * (sample is not None))
        return sample

    monkeypatch.setattr(ShardReading, "next_sample", third_sample_waits_for_the_display)
    monkeypatch.setattr(build_module, "SHOW_S", 0.0)
    monkeypatch.setattr(pool, "PULSE_S", 0.0)
    report = pipeline.encode(tiny_job(tmp_path, tmp_path / "out", "engine.decoders=1"), display)
    assert report.shards_total == 1
    total = sum((tmp_path / f"{n}.mp4").stat().st_size for n in range(4))
    done = [progress.bytes_done for progress in display.seen]
    assert {progress.bytes_total for progress in display.seen} == {total}
    assert display.between
    assert done == sorted(done)  # nothing failed, so it never goes back
    assert (done[0], done[-1]) == (0, total)
    moving = display.between[-1]
    assert moving.shards_done == 0
    assert moving.eta_s > 0
    assert 0 < moving.percent < 100
    assert f"{moving.percent}% of" in progress_line(moving)


class PulsingPool(ScriptedPool):
    """Reports most of a shard's bytes before each attempt ends; one event a poll."""

    def assign(self, worker, shard, blamed=()):
        self._events.append(Pulse(worker, WorkerStats(bytes_done={shard.id("f" * 32): shard.num_bytes * 4 // 5})))
        super().assign(worker, shard)

    def poll(self, timeout_s):
        events = super().poll(timeout_s)
        self._events = events[1:]
        return events[:1]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_bytes_done_never_exceed_the_total_and_a_retried_shard_counts_once(tmp_path, monkeypatch, failures):
    monkeypatch.setattr(build_module, "SHOW_S", 0.0)
    outcome = lambda shard, run: LatheError("crash") if run <= failures and shard.name in ("s4", "s5") else None  # noqa: E731
    build, report, _ = make_build(tmp_path, ProbedStore(tmp_path / "out"), PulsingPool(outcome))
    build._display = display = Recorder()
    build.run()
    assert report.shards_done == 6
    done = [progress.bytes_done for progress in display.seen]
    assert max(done) == done[-1] == display.seen[-1].bytes_total == 21
    assert any(later < earlier for earlier, later in pairwise(done)) == (failures > 0)


def test_of_two_attempts_at_one_shard_the_furthest_counts():
    live = LiveCounts()
    live.pulse("a", WorkerStats(frames=5, clips=1, bytes_done={"x": 30, "y": 10}))
    live.pulse("b", WorkerStats(frames=7, clips=2, bytes_done={"x": 40, "ended": 99}))
    assert live.bytes_inside({"x", "y"}) == 50
    live.ended("b", "x")
    assert live.bytes_inside({"x", "y"}) == 40
    live.remove("a")
    assert live.bytes_inside({"x", "y"}) == 0
    assert (live.frames, live.clips) == (7, 2)

"""Limits of a build: the decision on plain values, and a build that stops at one."""

import pytest

from pipeline.engine.driver.budget import Budget, Spent, Unlimited, UpTime
from pipeline.errors import Interrupted, LeaseLost
from pipeline.process import signals
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build

HOUR = 3600.0


@pytest.mark.parametrize(
    ("budget", "spent", "reason"),
    [
        (Budget(), Spent(1e9, 10**6, 1e9), None),
        (Budget(hours=8), Spent(8 * HOUR - 1, 0, 0), None),
        (Budget(hours=8), Spent(8 * HOUR, 0, 0), "max_hours=8 reached after 8.00 hours"),
        (Budget(shards=5), Spent(0, 4, 0), None),
        (Budget(shards=5), Spent(0, 5, 0), "max_shards=5 reached"),
        (Budget(gpu_hours=2.5), Spent(9 * HOUR, 9, 2.5 * HOUR - 1), None),
        (
            Budget(gpu_hours=2.5),
            Spent(0, 0, 2.6 * HOUR),
            "max_gpu_hours=2.5 reached: encoders were up for 2.60 hours",
        ),
        (Budget(hours=1, shards=5, gpu_hours=1), Spent(0.5 * HOUR, 2, 0.9 * HOUR), None),
    ],
)
def test_build_stops_when_it_has_used_its_budget(budget, spent, reason):
    assert budget.exhausted(spent) == reason


def test_up_time_sums_encoders_that_are_up_and_those_that_are_gone():
    up = UpTime()
    up.remove("never up", 1.0)
    up.add("a", 10.0)
    up.add("b", 12.0)
    up.remove("a", 15.0)
    assert up.seconds(20.0) == 5 + 8
    up.add("a", 20.0)
    assert up.seconds(21.0) == 5 + 9 + 1


class Limited(Unlimited):
    def __init__(self, budget):
        self.budget = budget


@pytest.mark.parametrize(
    ("budget", "done"),
    [(Budget(shards=2), range(2, 5)), (Budget(hours=1e-12), range(1)), (Budget(gpu_hours=1e-12), range(5))],
)
def test_build_that_reaches_a_limit_finishes_running_shards_and_leaves_the_rest(tmp_path, budget, done):
    pool = ScriptedPool(lambda shard, runs: None)
    build, report, notices = make_build(tmp_path, ProbedStore(str(tmp_path)), pool, "engine.credit=1", shards=9)
    build._control = Limited(budget)
    build.run()
    assert report.shards_done in done
    assert report.shards_done == len(pool.runs), "what was started was finished"
    assert report.stopped.startswith("max_")
    assert any(report.stopped in line for line in notices)
    assert pool.closed


def test_build_whose_last_shards_run_when_a_limit_is_reached_is_complete(tmp_path):
    class Late(ScriptedPool):
        def poll(self, timeout_s):
            if len(self.runs) == 2 and control.budget.hours is None:  # both run
                control.budget = Budget(hours=1e-12)
                return []
            return super().poll(timeout_s)

    pool, control = Late(lambda shard, runs: None), Limited(Budget())
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path)), pool, shards=2)
    build._control = control
    build.run()
    assert (report.shards_done, report.shards_left, report.stopped) == (2, 0, None)


def test_signal_to_a_build_that_a_limit_has_stopped_is_answered(tmp_path, monkeypatch):
    class Signalled(ScriptedPool):
        def poll(self, timeout_s):
            if not self.runs or signals.requested():
                return super().poll(timeout_s)
            if control.budget.hours is not None:
                monkeypatch.setattr(signals._State, "received", 1)
            control.budget = Budget(hours=1e-12)  # while shards run
            return []

    pool, control = Signalled(lambda shard, runs: None), Limited(Budget())
    build, report, notices = make_build(tmp_path, ProbedStore(str(tmp_path)), pool, shards=9)
    build._control = control
    with pytest.raises(Interrupted):
        build.run()
    assert report.shards_done == len(pool.runs) == 4
    assert [line.partition(": running shards")[0] for line in notices] == [f"stopping, {report.stopped}", "stopping"]


def test_encoder_time_is_in_the_report(tmp_path):
    pool = ScriptedPool(lambda shard, runs: None)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path)), pool)
    build.run()
    assert (report.encoder_s > 0, report.stopped) == (True, None)


def test_caller_ends_a_build_at_once(tmp_path):
    class Lost(Unlimited):
        def check(self):
            raise LeaseLost("taken over")

    pool = ScriptedPool(lambda shard, runs: None)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path)), pool)
    build._control = Lost()
    with pytest.raises(LeaseLost) as ended:
        build.run()
    assert ended.value.report is report
    assert pool.closed

"""What a build shows to others: its log tells each shard's attempts, its heartbeat what each worker does, its series what was counted."""

import json

import pytest

from pipeline.engine.driver import observer as observer_module
from pipeline.engine.driver.live_counts import WINDOW_S, LiveCounts
from pipeline.engine.driver.observer import BuildObserver
from pipeline.engine.driver.worker_activity import LISTED, SLOWEST, Activity, activity, describe
from pipeline.engine.ray.metrics import SERIES
from pipeline.engine.worker.pool import WorkerGone
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.errors import LatheError, ShardsFailed, SourceChanged, WorkerLost
from pipeline.format.layout import CURRENT
from pipeline.operate.run_logs import events, run_logs
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build, unavailable


def log_of(store):
    ((_, keys),) = run_logs(store, CURRENT).items()
    return list(events(store, keys))


def names(found, shard):
    return [event["event"] for event in found if event.get("shard") == shard]


class LosingPool(ScriptedPool):
    """Its second worker is preempted with the first shard it gets."""

    lost = False

    def assign(self, worker, shard, blamed=()):
        if worker == "w1" and not self.lost:
            self.lost = True
            self._events.append(WorkerGone(worker, WorkerLost("w1 lost: its node was preempted"), "preempted"))
            return
        super().assign(worker, shard)


def test_the_log_tells_every_attempt_of_every_shard(tmp_path):
    def outcome(shard, run):
        if shard.name == "s0":
            return SourceChanged("s0.tar has another etag")
        return LatheError("crash") if shard.name == "s2" and run == 1 else None

    store = ProbedStore(tmp_path / "out")
    build, report, _ = make_build(tmp_path, store, LosingPool(outcome), "engine.credit=1")
    build.run()
    found = log_of(store)
    assert [found[0]["event"], found[-1]["event"]] == ["started", "ended"]
    assert found[0]["shards"] == 6
    assert found[0]["attempts"] == "0123abcd"
    assert "drill" not in found[0]["job"]
    assert names(found, "s0") == ["assigned", "given_up"]
    assert names(found, "s2") == ["assigned", "retried", "assigned", "done"]
    assert names(found, "s1")[-1] == "done"
    (gone,) = [event for event in found if event["event"] == "worker_gone"]
    assert (gone["worker"], gone["cause"]) == ("w1", "preempted")
    moved = [event for event in found if event["event"] == "retried" and "preempted" in event["reason"]]
    assert len(moved) == 1
    end = found[-1]
    assert (end["outcome"], end["report"]["shards_done"]) == ("shards_failed", 5)
    assert end["report"]["failed"] == report.failed
    assert build._observer.build.endswith("-0123abcd")


def test_an_outage_and_an_error_that_ends_the_build_are_in_the_log(tmp_path):
    store = ProbedStore(tmp_path / "out")

    def outcome(shard, run):
        store.down = True
        return unavailable(shard)

    build, _, _ = make_build(tmp_path, store, ScriptedPool(outcome), "engine.outage_s=0.3")
    with pytest.raises(LatheError, match=r"engine\.outage_s"):
        build.run()
    found = log_of(store)
    assert [event["state"] for event in found if event["event"] == "outage"] == ["began"]
    assert (found[-1]["event"], found[-1]["outcome"]) == ("ended", "error")
    assert "engine.outage_s" in found[-1]["reason"]
    assert found[-1]["open_shards"] == 6


class Recorded(dict):
    def record(self, values):
        self.update(values)


def test_numbers_for_prometheus_are_those_of_the_log_and_have_series(tmp_path, monkeypatch):
    monkeypatch.setattr(observer_module, "SHOW_S", 0.0)
    store = ProbedStore(tmp_path / "out")
    outcome = lambda shard, run: LatheError("crash") if shard.name == "s2" and run == 1 else None  # noqa: E731
    meters = Recorded()
    monkeypatch.setattr("tests.engine.scripted_pool.ScriptedExecutor.meters", lambda self: meters)
    build, report, _ = make_build(tmp_path, store, LosingPool(outcome), "engine.credit=1")
    monkeypatch.setattr("pipeline.engine.driver.build.SHOW_S", 0.0)
    report.rejects["too_short"] = 3
    build.run()
    assert meters["lathe_shards_total", "done"] == 6
    assert meters["lathe_shards_total", "retried"] == 2
    assert meters["lathe_workers_lost_total", "preempted"] == 1
    assert meters["lathe_rejects_total", "too_short"] == 3
    assert meters["lathe_committed_bytes_total", ""] == report.num_bytes == 60
    assert (meters["lathe_encoders", ""], meters["lathe_shards_open", ""]) == (1, 0)
    labels = {series.name: series.label for series in SERIES if series.source in ("driver", "both")}
    assert {name for name, _ in meters} <= set(labels)
    assert all(bool(labels[name]) == bool(value) for name, value in meters)


def test_shares_of_a_worker_are_of_the_time_between_its_pulses():
    before = WorkerStats(frames=100, encode_s=5.0, decode_wait_s=1.0)
    after = WorkerStats(frames=180, encode_s=8.0, decode_wait_s=6.0, fetch_wait_s=1.0, video="a")
    found = activity(before, after, 10.0)
    assert found == Activity("decode", {"encode": 0.3, "decode": 0.5, "fetch": 0.1}, 8.0, "a")
    assert activity(before, before, 0.0).doing == "starting"
    assert activity(before, before, 5.0).doing == "busy"


def test_windows_of_a_worker_forget_what_is_over():
    live = LiveCounts()
    for n in range(10):  # it decodes in the first half and encodes in the second
        live.pulse(
            "w", WorkerStats(decode_wait_s=min(n, 5) * WINDOW_S, encode_s=max(n - 5, 0) * WINDOW_S), n * WINDOW_S
        )
    assert live.activities()["w"].shares == {"encode": 1.0}


def test_many_workers_are_summed_up_and_the_slowest_busy_ones_named():
    found = {f"w{n}": Activity("encode" if n % 2 else "fetch", {"encode": 1.0}, float(n), f"v{n}") for n in range(200)}
    held = {f"w{n}": {f"s{n}": 10.0} for n in range(10, 200)}
    told = describe(found, held, now=15.0, outage=True)
    assert told["num"] == 200
    assert told["doing"] == {"encode": 95, "fetch": 95, "outage": 10}
    assert told["only_slowest"]
    assert [item["worker"] for item in told["listed"]] == [f"w{n}" for n in range(10, 10 + SLOWEST)]
    assert told["listed"][0]["shard"] == "s10"
    assert told["listed"][0]["shard_s"] == 5.0
    assert len(json.dumps(told)) < 8000
    few = describe(dict(list(found.items())[:LISTED]), held, now=15.0, outage=False)
    assert (len(few["listed"]), few["only_slowest"]) == (LISTED, False)


def test_a_stopped_build_and_one_that_a_signal_killed_end_as_stopped(tmp_path):
    for number, (error, draining, outcome) in enumerate(
        [(None, True, "stopped"), (KeyboardInterrupt(), False, "stopped"), (ShardsFailed("x"), True, "error")]
    ):
        store = ProbedStore(tmp_path / f"out{number}")
        build, report, _ = make_build(tmp_path, store, ScriptedPool(lambda shard, run: None))
        observer = BuildObserver(store, build._observer._context, report, None)
        observer.close(error, 2, draining=draining)
        assert log_of(store)[-1]["outcome"] == outcome

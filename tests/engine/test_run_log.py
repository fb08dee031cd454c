"""Run log of a build: every event once and in order, in parts of bounded size, never waited for, complete after an outage of the store."""

import json
import time

import pytest

from pipeline.engine.driver import run_log
from pipeline.engine.driver.run_log import RunLog
from pipeline.errors import StorageUnavailable
from pipeline.format.layout import LAYOUTS
from pipeline.operate.run_logs import events, run_logs
from pipeline.storage.local import LocalStore
from tests.engine.test_heartbeat import Hanging

LAYOUT = LAYOUTS[2]


def logged(store, build="b"):
    return list(events(store, run_logs(store, LAYOUT)[build]))


def until(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_events_are_read_back_in_order_over_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "PART_BYTES", 1000)
    store = LocalStore(str(tmp_path))
    log = RunLog(store, "b", every_s=0.01)
    for n in range(100):
        log.event("assigned", n=n, shard="größer 000.tar")
    log.event("ended", outcome="done")
    log.close()
    found = logged(store)
    assert [event.get("n") for event in found] == [*range(100), None]
    assert all(event["ts"].endswith("+00:00") for event in found)
    sizes = [info.size for info in store.list("_runs/b/")]
    assert len(sizes) > 5
    assert max(sizes) < 1200


def test_the_first_event_is_in_the_store_before_the_build_ends(tmp_path):
    store = LocalStore(str(tmp_path))
    log = RunLog(store, "b")
    log.event("started", shards=3)
    until(lambda: run_logs(store, LAYOUT))  # of a build that is killed now, this is left
    assert logged(store)[0]["shards"] == 3
    log.close()


class Away(LocalStore):
    """A store that refuses writes until it is back."""

    back = False
    refused = 0

    def write(self, key, data):
        if not self.back:
            self.refused += 1
            raise StorageUnavailable("503")
        super().write(key, data)


def test_a_store_that_is_away_delays_the_log_and_loses_nothing(tmp_path):
    store = Away(str(tmp_path))
    log = RunLog(store, "b", every_s=0.01)
    for n in range(50):
        log.event("assigned", n=n)
    until(lambda: store.refused > 1)
    assert "503" in log.failure()
    assert log.failure() is None
    store.back = True
    until(lambda: run_logs(store, LAYOUT))
    log.event("ended")
    log.close()
    assert [event.get("n") for event in logged(store)] == [*range(50), None]


def test_memory_is_bounded_while_the_store_is_away_and_the_log_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "WAITING_BYTES", 4000)
    monkeypatch.setattr(run_log, "PART_BYTES", 1000)
    store = Away(str(tmp_path))
    log = RunLog(store, "b", every_s=0.01)
    for n in range(1000):
        log.event("assigned", n=n)
    log.event("ended")
    assert log._waiting_bytes < 5000
    store.back = True
    log.close()
    found = logged(store)
    kept = [event["n"] for event in found if event["event"] == "assigned"]
    assert kept == sorted(kept)
    assert len(kept) + sum(event["lines"] for event in found if event["event"] == "dropped") == 1000
    assert "ended" in [event["event"] for event in found]


def test_the_number_of_objects_is_bounded_and_the_end_is_always_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "PART_BYTES", 500)
    monkeypatch.setattr(run_log, "MOST_PARTS", 3)
    store = LocalStore(str(tmp_path))
    log = RunLog(store, "b", every_s=0.01)
    for n in range(500):
        log.event("assigned", n=n)
    log.event("ended", outcome="done")
    log.close()
    found = logged(store)
    assert len(list(store.list("_runs/b/"))) == 3
    assert found[-1]["event"] == "ended"
    kept = sum(event["event"] == "assigned" for event in found)
    assert kept + sum(event["lines"] for event in found if event["event"] == "dropped") == 500


def test_a_hanging_store_keeps_neither_the_driver_nor_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "CLOSE_S", 0.2)
    store = Hanging(str(tmp_path))
    log = RunLog(store, "b")
    for n in range(1000):
        log.event("assigned", n=n)
    log.close()
    assert not store.go.is_set()
    store.go.set()
    store.timer.cancel()


@pytest.mark.parametrize("version", [1, 2])
def test_names_of_parts_are_read_back(version):
    layout = LAYOUTS[version]
    key = layout.run_log_key("20260101T000000Z-01234567", 12)
    assert layout.run_log_name(key) == ("20260101T000000Z-01234567", 12)
    assert layout.run_log_name(key.replace(".jsonl", ".json")) is None


def test_half_a_line_of_a_killed_build_is_passed_over(tmp_path):
    store = LocalStore(str(tmp_path))
    lines = [json.dumps({"event": "started", "ts": "t"}), json.dumps({"event": "done"})[:9], "[]", ""]
    store.write(LAYOUT.run_log_key("b", 1), "\n".join(lines).encode())
    assert [event["event"] for event in logged(store)] == ["started"]

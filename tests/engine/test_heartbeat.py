"""Heartbeats: one object a build, never waited for, removed at the end of a build, never another build's."""

import json
import os
import threading
import time

import pytest

from pipeline.config import StorageConfig
from pipeline.engine.driver import heartbeat
from pipeline.engine.driver.heartbeat import Heartbeat
from pipeline.errors import StorageUnavailable
from pipeline.ledger.receipts import Ledger
from pipeline.operate.status import status
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore

NUMBERS = {"shards_done": 1, "shards_total": 3, "frames_per_s": 2.0}


@pytest.fixture
def store(tmp_path):
    found = open_store(str(tmp_path / "out"), StorageConfig())
    Ledger(found).prepare("lathe")
    return found


def until(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def keys(store):
    return [info.key for info in store.list("_progress/")]


def test_two_builds_write_two_objects_and_each_removes_its_own(store):
    builds = [Heartbeat(store, "f" * 32) for _ in range(2)]
    for number, build in enumerate(builds):
        build.offer({**NUMBERS, "shards_done": number})
        until(lambda build=build: build.key in keys(store))
    assert status(store)["progress"]["pid"] == os.getpid()
    builds[1].close()
    assert keys(store) == [builds[0].key]
    assert status(store)["progress"]["shards_done"] == 0
    builds[0].close()
    assert keys(store) == []
    assert status(store)["progress"] is None


def test_latest_numbers_are_written(store):
    build = Heartbeat(store, "f" * 32, every_s=0.01)
    for number in range(200):
        build.offer({**NUMBERS, "shards_done": number})
    until(lambda: keys(store) and json.loads(store.read(build.key))["shards_done"] == 199)
    build.close()


class Hanging(LocalStore):
    """A store that answers writes when it is let go: by the test, or by a timer if that waits for it."""

    def __init__(self, root):
        super().__init__(root)
        self.asked, self.go = threading.Event(), threading.Event()
        self.timer = threading.Timer(60, self.go.set)
        self.timer.daemon = True

    def write(self, key, data):
        if not self.asked.is_set():
            self.timer.start()
        self.asked.set()
        self.go.wait()
        super().write(key, data)


def test_heartbeat_never_waits_for_a_hanging_store(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "CLOSE_S", 0.2)
    slow = Hanging(str(tmp_path))
    build = Heartbeat(slow, "f" * 32)
    for _ in range(1000):
        build.offer(NUMBERS)
    assert slow.asked.wait(60)
    build.offer(NUMBERS)
    assert build.failure() is None
    build.close()  # gives up waiting
    assert not slow.go.is_set()
    slow.go.set()
    slow.timer.cancel()


def test_refused_heartbeat_is_reported_once(tmp_path, monkeypatch):
    store = LocalStore(str(tmp_path))

    def refuse(key, data):
        refused.append(key)
        raise StorageUnavailable("503")

    monkeypatch.setattr(store, "write", refuse)
    build = Heartbeat(store, "f" * 32, every_s=0.01)
    refused, failures = [], []

    def offered():
        build.offer(NUMBERS)
        failures.extend(filter(None, [build.failure()]))
        return len(refused) > 3 and failures

    until(offered)
    build.close()
    assert len(failures) == 1
    assert "503" in failures[0]


def test_what_a_killed_build_left_is_not_shown_and_goes_after_a_day(store):
    facts = {"build": "old", "started": 1.0, "every_s": 30.0, "running": True, **NUMBERS}
    for name, age in (("yesterday", 25 * 3600), ("today", 3600)):
        store.write(f"_progress/{name}.json", json.dumps({**facts, "updated": time.time() - age}).encode())
        os.utime(store.uri(f"_progress/{name}.json"), (time.time() - age,) * 2)
    assert status(store)["progress"] is None
    build = Heartbeat(store, "f" * 32)
    build.offer(NUMBERS)
    until(lambda: "_progress/yesterday.json" not in keys(store))
    build.close()
    assert keys(store) == ["_progress/today.json"]

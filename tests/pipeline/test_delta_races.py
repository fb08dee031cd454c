"""The Delta log while others write: a takedown and a second publisher between any two steps of a first, and a kill at any step."""

import json
import os
import shutil
import threading

import pytest
from deltalake import DeltaTable

from pipeline.format.layout import DELTA_LOG, SNAPSHOTS, TAKEDOWNS
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate import delta_writing
from pipeline.operate.delta_contents import LAST_CHECKPOINT, LogReader, version_key
from pipeline.operate.delta_log import DeltaLog
from pipeline.storage.local import LocalStore
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all

STEPS = ("list", "read_range", "write", "put_if_absent", "delete")


class Watched(LocalStore):
    """Calls `then` before its step number `at` on the log, and counts these steps."""

    def __init__(self, root, at=None, then=None):
        super().__init__(root)
        self.steps, self._at, self._then, self._lock = 0, at, then, threading.RLock()

    def step(self, key):
        if key.startswith((DELTA_LOG, TAKEDOWNS, SNAPSHOTS)):
            with self._lock:
                self.steps += 1
                if self.steps == self._at:
                    self._then()


def _watched(name):
    def call(self, key="", *arguments, **options):
        self.step(key)
        return getattr(LocalStore, name)(self, key, *arguments, **options)

    return call


for _name in STEPS:
    setattr(Watched, _name, _watched(_name))


class Killed(BaseException):
    """End of a process."""


class Mortal(Watched):
    """Ends at its step number `at`: no step after it does anything."""

    def step(self, key):
        super().step(key)
        if self._at is not None and self.steps >= self._at:
            raise Killed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two snapshots without a log; the record of a takedown of one row that both have; the log before and after it."""
    folder = tmp_path_factory.mktemp("races")
    store = local_store(folder / "out")
    for number in range(2):
        add_shards(store, folder, range(number, number + 1))
        publish_all(store, delta=False)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_writing, "MANY", 0)  # every version has a checkpoint
        DeltaLog(store).sync()
        made["before"] = log_of(store)
        (first, *_) = Snapshots(store).table(Snapshots(store).read(1), "files").to_pylist()
        takedown = record_takedown(store, "asked", ids=["video00000-0000"])
        shutil.rmtree(store.uri(DELTA_LOG))
        DeltaLog(store).sync()
        made["after"] = log_of(store)
    path = first["key"].removeprefix("data/").encode()
    assert any(path in data for data in made["before"].values())
    assert not any(path in data for data in made["after"].values())
    data = store.read(takedown.key)
    store.delete(takedown.key)
    shutil.rmtree(store.uri(DELTA_LOG))
    return folder / "out", (takedown.key, data), made


def log_of(store):
    return {info.key: store.read(info.key) for info in store.list(DELTA_LOG)}


def missing_last(store, made):
    """The newest version is missing: the first publisher adds it."""
    for key, data in made["before"].items():
        store.write(key, data)
    for key in [key for key in made["before"] if f"{2:020}" in key]:
        store.delete(key)
    last = json.loads(made["before"][DELTA_LOG + LAST_CHECKPOINT])
    record = LogReader(store).read().checkpoints[1].record
    last |= {"version": 1, "size": 3, "tags": last["tags"] | {"record": record}}
    store.write(DELTA_LOG + LAST_CHECKPOINT, json.dumps(last).encode())


def outdated(store, made):
    """All versions are from another takedown than those that there are: the first publisher writes all anew."""
    for key, data in made["after"].items():
        store.write(key, data)


def absent(store, made):
    """There is no log yet."""


@pytest.fixture
def begin(base, tmp_path, monkeypatch):
    """Gives a function that makes fresh copies of the output in the state in which the first publisher finds it."""
    output, record, made = base
    monkeypatch.setattr(delta_writing, "MANY", 0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine fails here

    def copies(state):
        def copy(name):
            shutil.copytree(output, tmp_path / name, copy_function=os.link)
            state(local_store(tmp_path / name), made)
            return local_store(tmp_path / name)

        return copy, record, made

    return copies


@pytest.mark.parametrize("state", [missing_last, outdated, absent])
def test_no_takedown_and_second_publisher_in_between_leaves_a_file_that_was_taken(begin, state):
    copy, record, made = begin(state)
    counting = Watched(copy("count").root)
    DeltaLog(counting).sync()
    assert log_of(local_store(counting.root)) == made["before"]
    for at in range(1, counting.steps + 1):
        store = copy(f"at-{at}")

        def take_and_sync(store=store):
            store.write(*record)
            DeltaLog(store).sync()

        DeltaLog(Watched(store.root, at, take_and_sync)).sync()
        assert log_of(store) == made["after"], f"step {at} of {counting.steps}"


def test_a_takedown_before_the_last_pass_is_in_the_log(begin):
    """One that comes later is in it after the next publish."""
    copy, record, made = begin(outdated)
    counting = Watched(copy("count").root)
    DeltaLog(counting).sync()
    included = []
    for at in range(1, counting.steps + 1):
        store = copy(f"at-{at}")
        DeltaLog(Watched(store.root, at, lambda store=store: store.write(*record))).sync()
        included.append(log_of(store) == made["after"])
        assert included[-1] or log_of(store) == made["before"]
        DeltaLog(store).sync()
        assert log_of(store) == made["after"], f"step {at}"
    assert included == sorted(included, reverse=True)
    assert included.count(True) > counting.steps // 2


@pytest.mark.parametrize(("state", "taken"), [(missing_last, False), (outdated, True), (absent, False)])
def test_after_a_kill_anywhere_the_next_publisher_completes_the_log(begin, state, taken):
    copy, record, made = begin(state)
    counting = Watched(copy("count").root)
    DeltaLog(counting).sync()
    for at in range(1, counting.steps + 1):
        store = copy(f"at-{at}")
        with pytest.raises(Killed):
            DeltaLog(Mortal(store.root, at, lambda: None)).sync()
        if taken:
            store.write(*record)
        DeltaLog(store).sync()
        assert log_of(store) == made["after" if taken else "before"], f"step {at} of {counting.steps}"


def test_a_record_that_another_publisher_replaced_is_in_the_log(base, tmp_path):
    """A store whose create-only put does not decide races may keep the record of the second of two publishers."""
    shutil.copytree(base[0], tmp_path / "out")
    store = local_store(tmp_path / "out")
    DeltaLog(store).sync()
    before = store.read(version_key(2))
    theirs = store.read("_snapshots/2.json").replace(b'"created": "2', b'"created": "3')
    store.write("_snapshots/2.json", theirs)
    DeltaLog(store).sync()
    assert store.read(version_key(2)) != before
    assert store.read(version_key(2)).count(b'"add"') == 1


def test_the_number_of_a_killed_publisher_keeps_the_files_before_it(base, tmp_path):
    shutil.copytree(base[0], tmp_path / "out")
    store = local_store(tmp_path / "out")
    store.write("_snapshots/3.json", b"")
    add_shards(store, tmp_path, range(2, 3))
    publish_all(store)
    files = [len(DeltaTable(store.uri("data"), version=number).file_uris()) for number in range(5)]
    assert files == [0, 1, 2, 2, 3]
    assert store.read(version_key(4)).count(b'"add"') == 1, "not those of snapshot 2 again"


def test_a_log_of_an_earlier_state_of_lathe_is_written_anew(base, tmp_path):
    shutil.copytree(base[0], tmp_path / "out")
    store = local_store(tmp_path / "out")
    DeltaLog(store).sync()
    expected = log_of(store)
    store.write(version_key(1), b'{"commitInfo":{"engineInfo":"lathe","operation":"WRITE","takedowns":"00"}}\n')
    DeltaLog(store).sync()
    assert log_of(store) == expected


@pytest.mark.parametrize("state", [outdated, absent])
def test_a_snapshot_that_gc_deletes_in_between_does_not_stop_a_publisher(begin, state):
    copy, _, _ = begin(state)
    counting = Watched(copy("count").root)
    DeltaLog(counting).sync()
    logs = []
    for at in range(1, counting.steps + 1):
        store = copy(f"at-{at}")

        def forget(store=store):
            store.delete("_snapshots/1.json")
            for key in list(store.keys("_snapshots/1/")):
                store.delete(key)

        view = DeltaLog(Watched(store.root, at, forget)).sync()
        assert view.version == 2, f"step {at} of {counting.steps}"
        DeltaLog(store).sync()
        logs.append(log_of(store))
    assert all(log == logs[0] for log in logs)

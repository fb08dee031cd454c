"""The encode loop around its attempts: what cannot start, what counts as movement, what is told."""

import json
import tempfile
import threading
import time

import pytest

from pipeline.engine.worker.encode_loop import EncodeLoop, LoopStats, ShardFailure, describe_stats
from pipeline.errors import StorageUnavailable
from tests.engine.attempts import blueprint_of, shards_of
from tests.tiny_corpus import write_tar


class IdleLanes:
    """One decoder that never comes up: these tests are about what happens around it."""

    count = 1
    start_limit_s = float("inf")

    def wait(self, timeout_s):
        time.sleep(timeout_s)
        return []

    def restart(self, lane): ...

    def close(self): ...


class IdleEncoder:
    """An encoder that is never given anything."""

    overlaps = False

    def largest_batch(self, shape):
        return 1

    def choices(self):
        return {}


@pytest.fixture
def loop(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}": {"mp4": b"video" * 1000} for n in range(3)})
    loop = EncodeLoop(blueprint_of(tmp_path / "a.tar", tmp_path / "out"), IdleEncoder(), IdleLanes())
    yield loop
    loop.close()


def outcomes_of(loop):
    ended = []
    while loop.shards_in_flight:
        ended += loop.step()
    return ended


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_shard_whose_scratch_folder_cannot_be_made_fails_and_the_next_one_starts(loop, tmp_path, monkeypatch, kind):
    (shard,) = shards_of(loop._blueprint)
    folder = {"missing": tmp_path / "none", "a file": tmp_path / "a.tar", "read-only": "/proc"}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        loop.submit(shard)
        assert loop.shards_in_flight == 1
        (failure,) = outcomes_of(loop)
    assert isinstance(failure, ShardFailure)
    assert failure.shard_id == shard.id(loop._blueprint.fingerprint)
    assert isinstance(failure.error, StorageUnavailable)
    assert str(folder) in str(failure.error)
    assert "TMPDIR" in str(failure.error)
    loop.submit(shard)
    assert loop.step() == []
    assert loop.shards_in_flight == 1


def test_a_machine_that_starts_no_thread_fails_the_shard_only(loop, tmp_path, monkeypatch):
    (shard,) = shards_of(loop._blueprint)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        loop.submit(shard)
    (failure,) = outcomes_of(loop)
    assert "thread" in str(failure.error)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_failing_attempt_is_reported_once_its_files_are_gone(loop):
    (shard,) = shards_of(loop._blueprint)
    loop.submit(shard)
    (attempt,) = loop._attempts
    attempt.fail(StorageUnavailable("the disk"))
    (failure,) = outcomes_of(loop)
    assert str(failure.error) == "the disk"
    assert not attempt.spool_dir.exists()


def test_progress_is_told_as_a_number_that_follows_bytes_and_not_the_clock(loop, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that was stepped back
    assert describe_stats(LoopStats())["progress"] == 0
    (shard,) = shards_of(loop._blueprint)
    loop.submit(shard)
    while (told := describe_stats(loop.stats))["progress"] < 15_000:  # without a step, a decoder or an event
        time.sleep(0.01)
    assert told["frames"] == 0
    assert json.loads(json.dumps(told)) == told
    for attempt in loop._attempts:
        attempt.fail(StorageUnavailable("enough"))
    outcomes_of(loop)
    assert describe_stats(loop.stats)["progress"] >= told["progress"]

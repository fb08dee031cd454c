"""The encode loop around its attempts: attempts that cannot start, what counts as progress, when failures are reported."""

import tempfile
import threading
import time

import pytest

from pipeline.engine.driver.worker_activity import activity
from pipeline.engine.worker.encode_loop import EncodeLoop, ShardFailure
from pipeline.errors import HandedBack, StorageUnavailable
from tests.engine.attempts import context_of, shards_of
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
    compiling_s = 0.0

    def largest_batch(self, shape):
        return 1

    def device_bytes(self):
        return 0

    def compile_s(self):
        return self.compiling_s

    def choices(self):
        return {}


@pytest.fixture
def loop(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}": {"mp4": b"video" * 1000} for n in range(3)})
    loop = EncodeLoop(context_of(tmp_path / "a.tar", tmp_path / "out"), IdleEncoder(), IdleLanes())
    yield loop
    loop.close()


def outcomes_of(loop):
    ended = []
    while loop.shards_in_flight:
        ended += loop.step()
    return ended


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_shard_without_a_scratch_folder_fails_and_the_next_one_starts(loop, tmp_path, monkeypatch, kind):
    (shard,) = shards_of(loop._context)
    folder = {"missing": tmp_path / "none", "a file": tmp_path / "a.tar", "read-only": "/proc"}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        loop.submit(shard)
        assert loop.shards_in_flight == 1
        (failure,) = outcomes_of(loop)
    assert isinstance(failure, ShardFailure)
    assert failure.shard_id == shard.id(loop._context.fingerprint)
    assert isinstance(failure.error, StorageUnavailable)
    assert str(folder) in str(failure.error)
    assert "TMPDIR" in str(failure.error)
    loop.submit(shard)
    assert loop.step() == []
    assert loop.shards_in_flight == 1


def test_shard_fails_alone_where_no_thread_can_start(loop, tmp_path, monkeypatch):
    (shard,) = shards_of(loop._context)

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


def test_failed_attempt_is_reported_after_its_files_are_deleted(loop):
    (shard,) = shards_of(loop._context)
    loop.submit(shard)
    (attempt,) = loop._attempts
    attempt.fail(StorageUnavailable("the disk"))
    (failure,) = outcomes_of(loop)
    assert str(failure.error) == "the disk"
    assert not attempt.spool_dir.exists()


def test_attempt_that_is_handed_back_deletes_its_files_and_others_go_on(loop, tmp_path):
    write_tar(tmp_path / "b.tar", {"x": {"mp4": b"video" * 1000}})
    context = context_of(tmp_path, tmp_path / "out")
    first, second = (shard.id(context.fingerprint) for shard in shards_of(context))
    for shard in shards_of(context):
        loop.submit(shard)
    loop.hand_back([first, "of another worker"])
    while loop.shards_in_flight > 1:
        ended = loop.step()
    (failure,) = ended
    assert (failure.shard_id, type(failure.error)) == (first, HandedBack)
    assert [attempt.shard_id for attempt in loop._attempts] == [second]


def test_progress_is_a_number_that_follows_bytes_and_not_the_clock(loop, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that was stepped back
    assert loop.live_stats().progress == 0
    (shard,) = shards_of(loop._context)
    loop.submit(shard)
    while (stats := loop.live_stats()).progress < 15_000:  # without a step, a decoder or an event
        time.sleep(0.01)
    assert (stats.frames, stats.bytes_done) == (0, {shard.id(loop._context.fingerprint): 0})
    for attempt in loop._attempts:
        attempt.fail(StorageUnavailable("enough"))
    outcomes_of(loop)
    assert loop.live_stats().progress >= stats.progress


def test_compiling_is_progress_so_that_an_encoder_at_it_is_not_taken_for_one_that_hangs(loop):
    before = loop.live_stats()
    loop._encoder.compiling_s = 42.0
    after = loop.live_stats()
    assert after.progress > before.progress
    assert activity(before, after, 42.0).doing == "compile"
    loop._encoder.compiling_s = 1e6
    endless = loop.live_stats().progress
    loop._encoder.compiling_s = 2e6
    assert loop.live_stats().progress == endless, "a compiler that hangs is found"

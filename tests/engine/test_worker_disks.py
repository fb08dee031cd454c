"""A worker with a full disk fails no shard; a shard too large for every disk is given up; full disks everywhere end the build."""

import pytest

from pipeline.errors import BuildError, StorageUnavailable
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.engine.driver.dispatch.PAUSE_S", 0.02)
    monkeypatch.setattr("pipeline.engine.driver.worker_disks.REST_S", 0.02)
    monkeypatch.setattr("pipeline.engine.driver.worker_disks.LONGEST_REST_S", 0.05)


def test_full_temporary_disk_pauses_with_one_notice(tmp_path):
    store = ProbedStore(str(tmp_path / "out"))

    def outcome(shard, run):
        full = f"spool folder {tmp_path}/lathe-scratch-{shard.name}{run} cannot be written: No space left on device; TMPDIR moves it"
        return StorageUnavailable(full, shard=shard.name) if sum(pool.runs.values()) < 60 else None

    pool = ScriptedPool(outcome)
    build, report, notices = make_build(tmp_path, store, pool, shards=12)
    build.run()
    assert report.ok
    assert len([line for line in notices if "No space left" in line]) <= 3
    assert len(notices) <= 6


def full_disk(shard):
    return StorageUnavailable("temporary folder /tmp cannot be written: No space left on device", shard=shard.name)


class FullDiskCrew(ScriptedPool):
    """The disk of w0 is full, so that it ends every shard at once; the others need some polls for one."""

    def __init__(self, workers):
        super().__init__(lambda shard, run: None, workers)
        self.on_full = 0
        self._later = []

    def assign(self, worker, shard, blamed=()):
        if worker == "w0":
            self.on_full += 1
        self._outcome = (lambda *_: full_disk(shard)) if worker == "w0" else (lambda *_: None)
        super().assign(worker, shard)
        if worker != "w0":
            self._later.append([4, self._events.pop()])

    def poll(self, timeout_s):
        for item in self._later:
            item[0] -= 1
        self._events += [event for left, event in self._later if left <= 0]
        self._later = [item for item in self._later if item[0] > 0]
        return super().poll(timeout_s)


def test_worker_with_a_full_disk_fails_no_shard(tmp_path):
    pool = FullDiskCrew(3)
    build, report, notices = make_build(
        tmp_path, ProbedStore(str(tmp_path / "out")), pool, "engine.attempts=1", "engine.credit=1", shards=60
    )
    build.run()
    assert report.ok
    assert 0 < pool.on_full < 40
    assert len(notices) <= 4


def test_full_disks_of_all_workers_end_the_build_after_outage_s(tmp_path):
    pool = ScriptedPool(lambda shard, run: full_disk(shard), 2)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool, "engine.outage_s=0.5", shards=40)
    with pytest.raises(
        BuildError, match=r"temporary folder of every encoder .*No space left.*the same command resumes"
    ):
        build.run()
    assert not report.failed


@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_that_is_too_large_for_the_disk_is_given_up(tmp_path, workers):
    pool = ScriptedPool(lambda shard, run: full_disk(shard) if shard.name == "s9" else None, workers)
    build, report, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool, "engine.outage_s=30", shards=10)
    build.run()
    assert set(report.failed) == {"s9"}
    assert report.shards_done == 9

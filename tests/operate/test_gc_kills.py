"""`lathe gc` beside builds, with clocks that are off, and killed between any two steps."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine.driver.heartbeat import Heartbeat
from pipeline.errors import LeaseHeld, OutputError
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.verify import verify_output
from pipeline.storage import ObjectInfo, Store
from pipeline.storage.local import LocalStore
from tests import forked_command
from tests.operate.outputs import (
    NEWEST,
    aged,
    files_of,
    listing,
    receipt_for,
    shown,
    snapshot_numbers,
    stored,
    tar,
    write_files,
    write_version,
)
from tests.pipeline.latent_clips import FINGERPRINT, latent_clip, local_store
from tests.pipeline.published import publish_all

# --- builds, clocks, leases -------------------------------------------------------------------------------------------


def test_files_of_a_running_build_stay(store: Store, tmp_path: Path) -> None:
    beat = Heartbeat(store, FINGERPRINT, every_s=300.0)
    old = files_of(write_files(store, tmp_path, tar("x", "e1"), [latent_clip(50)]))
    aged(store, keys=old)
    try:
        beat.offer({"shards_total": 1, "shards_done": 0})
        while not store.exists(beat.key):
            assert beat._thread.is_alive()
            beat._closing.wait(0.01)
        new = files_of(write_files(store, tmp_path, tar("y", "e1"), [latent_clip(51)]))
        found = collect(store, GcOptions(grace_s=0))
        assert (found["running"], found["kept"]["of_running_build"]) == ([beat.build], 1)
        assert new <= stored(store)
        assert not old & stored(store)
        assert store.exists(beat.key)
    finally:
        beat.close()


def test_a_build_that_fell_silent_stops_gc_until_it_is_said_to_have_ended(store: Store) -> None:
    key = "_progress/20260101T000000Z-ab.json"
    store.write(key, json.dumps({"every_s": 30.0, "started": 0.0, "updated": 0.0, "running": True}).encode())
    aged(store, days=0.1, keys=[key])
    before = listing(store)
    with pytest.raises(
        OutputError, match=r"build 20260101T000000Z-ab has not been heard of for 2h2\dm.*--ended 20260101T000000Z-ab"
    ):
        collect(store)
    assert {key: etag for key, etag in listing(store).items() if not key.startswith("_leases/")} == before
    found = collect(store, GcOptions(ended=("20260101T000000Z-ab", "another")))
    assert found["deleted"]["heartbeats"] == 1
    assert found["notices"] == ["--ended another: there is no heartbeat of a build of this name"]
    assert not store.exists(key)


class Late(LocalStore):
    """A store whose clock is an hour behind."""

    def stat(self, key: str) -> ObjectInfo:
        found = super().stat(key)
        return ObjectInfo(found.key, found.size, found.etag, found.modified - 3600)


def test_a_store_whose_clock_is_off_is_refused(store: Store) -> None:
    before = stored(store), snapshot_numbers(store)
    with pytest.raises(OutputError, match=r"the clock of .* is 1h00m behind that of this machine"):
        collect(Late(store.root), NEWEST)
    assert (stored(store), snapshot_numbers(store)) == before


def test_a_damaged_snapshot_stops_gc_unless_a_newer_one_passed_over_it(store: Store) -> None:
    (table,) = [info.key for info in store.list("_snapshots/2/files-")]
    store.write(table, b"damaged")
    before = stored(store)
    with pytest.raises(
        OutputError, match=r"nothing was deleted: .*_snapshots/2/files.* is not the table that was published"
    ):
        collect(store)
    assert stored(store) == before
    publish_all(store, rebuild=True)
    found = collect(store)
    assert any("_snapshots/2/" in text for text in found["notices"])
    record = record_takedown(store, "asked", sources=[receipt_for(store, "a").shard.objects[0].uri])
    publish_all(store)
    at_once = GcOptions(grace_s=0.0)
    (kept,) = collect(store, at_once)["takedowns"]["stored"]
    assert kept == {"record": record.key, "files": 1, "snapshots": [1, 3, 4]}
    found = collect(store, replace(at_once, forget=True))
    assert found["snapshots"]["forgotten"] == [1, 2, 3, 4], "what snapshot 2 names is not known"
    assert found["takedowns"] == {"names_removed": [record.key], "stored": []}


def test_receipts_that_are_gone_stop_gc(store: Store, tmp_path: Path) -> None:
    """A copy of an output that is not complete, or a folder that was lost: files of its other receipts look like orphans."""
    whole = listing(store)
    pending = write_version(store, tmp_path, "d", "e1", (30,))
    aged(store)
    shutil.move(store.uri("_receipts"), tmp_path / "receipts")
    with pytest.raises(
        OutputError, match=r"nothing was deleted: 4 receipts that snapshot 3 covers are gone, such as _rec"
    ):
        collect(store, NEWEST)
    shutil.move(tmp_path / "receipts", store.uri("_receipts"))
    found = collect(store, NEWEST)
    assert (found["kept"]["pending"], found["deleted"]["orphan"]["files"]) == (1, 0)
    assert files_of(pending) <= stored(store)
    assert set(whole) - set(listing(store)), "the retired snapshots are gone"


def test_a_delta_log_that_another_program_wrote_to_stops_gc_before_anything_is_deleted(store: Store) -> None:
    store.write("data/_delta_log/00000000000000000004.json", b'{"commitInfo": {"engineInfo": "other"}}\n')
    before = listing(store)
    with pytest.raises(OutputError, match="was not written by Lathe: only Lathe may write this log"):
        collect(store, NEWEST)
    assert {key: etag for key, etag in listing(store).items() if not key.startswith("_leases/")} == before


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """End of a process."""


class Mortal(LocalStore):
    """Ends at its write or deletion number `at` of what gc looks after: nothing is done after it."""

    def __init__(self, root: str, at: int | None = None) -> None:
        super().__init__(root)
        self.steps, self._at = 0, at

    def _step(self, key: str) -> bool:
        """Whether to do it. The lease's thread ends quietly."""
        if key.startswith(("_leases/", ".lathe-probe-")):
            return self._at is None or self.steps < self._at
        self.steps += 1
        if self._at is not None and self.steps >= self._at:
            raise Killed
        return True

    def write(self, key: str, data: bytes) -> None:
        if self._step(key):
            super().write(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._step(key) and super().put_if_absent(key, data)

    def delete(self, key: str) -> None:
        if self._step(key):
            super().delete(key)


def test_a_kill_between_any_two_steps_leaves_whole_snapshots_and_the_next_gc_goes_on(
    store: Store, tmp_path: Path
) -> None:
    """Takedown, retired receipt, two snapshots that go, Delta log. After each kill every snapshot whose record is there is read fully."""
    record_takedown(store, "asked", sources=[receipt_for(store, "a").shard.objects[0].uri])
    collect(store, GcOptions(keep_snapshots=3))  # nothing retires yet: older snapshots show it
    publish_all(store)
    aged(store)
    expected = {number: shown(store, number) for number in snapshot_numbers(store)}
    whole = tmp_path / "whole"
    shutil.copytree(store.root, whole)
    counted = Mortal(str(whole))
    collect(counted, NEWEST)
    final = without_leases(local_store(whole))
    assert counted.steps > 10
    for at in range(1, counted.steps + 1):
        folder = tmp_path / f"killed{at}"
        shutil.copytree(store.root, folder)
        with pytest.raises(Killed):
            collect(Mortal(str(folder), at), NEWEST)
        there = local_store(folder)
        for number in {min(snapshot_numbers(there)), max(snapshot_numbers(there))}:
            assert shown(there, number) == expected[number], at
        shutil.rmtree(folder / "_leases")  # what its expiry does
        collect(there, NEWEST)
        assert without_leases(there) == final, at
        shutil.rmtree(folder)


def without_leases(store: Store) -> set[str]:
    return {key for key in listing(store) if not key.startswith("_leases/")}


def kill_gc() -> None:
    """In the forked process, before the command runs."""
    import functools

    from pipeline.config import DrillConfig
    from pipeline.operate import gc

    drill = DrillConfig(point=os.environ["GC_POINT"], marker_dir=os.environ["GC_MARKS"])
    gc.collect = functools.partial(gc.collect, failures=drill)


@pytest.mark.parametrize("point", ["after_first_record", "after_first_file"])
def test_a_gc_that_is_killed_is_gone_on_with(store: Store, tmp_path: Path, point: str) -> None:
    write_files(store, tmp_path, tar("x", "e1"), [latent_clip(50)])
    aged(store)
    newest = shown(store, 3)
    options = ("gc", store.root, "--keep-snapshots", "1", "--keep-days", "0")
    env = {**os.environ, "GC_POINT": point, "GC_MARKS": str(tmp_path / "marks")}
    killed = forked_command.run(*options, env=env, prepare="tests.operate.test_gc_kills:kill_gc")
    assert killed.returncode == -9, killed.stderr
    assert snapshot_numbers(store) == ([2, 3] if point == "after_first_record" else [3])
    with pytest.raises(LeaseHeld, match=r"lathe gc of .* holds the lease 'maintenance'"):
        collect(store, NEWEST)
    shutil.rmtree(store.uri("_leases"))
    assert forked_command.run(*options).returncode == 0
    assert snapshot_numbers(store) == [3]
    assert shown(store) == newest
    assert verify_output(store).orphans == 2, "the file and index of the receipt that retired, for the grace time"
    assert Snapshots(store).whole(3).number == 3

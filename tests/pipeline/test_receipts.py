"""Ledger: one receipt per shard under races and kills; other versions and foreign folders are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DrillConfig, WriteConfig
from pipeline.errors import BuildError, OutputError
from pipeline.format.layout import CURRENT, ReceiptName
from pipeline.ledger.receipts import Ledger, imbalances, orphans
from pipeline.operate.verify import verify_output
from pipeline.records import Bucket, Counts, Receipt, Reject
from pipeline.storage import Store, open_store
from pipeline.storage.local import LocalStore
from tests.conftest import S3Server
from tests.pipeline.latent_clips import latent_clip, local_store, receipt_of, shard_of, shard_writer, write_shard

PROCESSES = multiprocessing.get_context("forkserver")  # one of them imports this module
PROCESSES.set_forkserver_preload([__name__])


class StoreWithoutConditions(LocalStore):
    """Stands in for object stores that accept `If-None-Match` and ignore it, as some appliances do."""

    def conditional_writes(self) -> bool:
        return False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def data_keys(store: Store) -> set[str]:
    return {info.key for prefix in ("data/", "_index/") for info in store.list(prefix)}


def named_keys(receipt: Receipt) -> set[str]:
    return {key for item in receipt.files for key in (item.key, item.index_key)}


# --- _latentset.json --------------------------------------------------------------------------------------------------


def test_prepare_makes_the_set_once(store: Store) -> None:
    ledger = Ledger(store)
    assert ledger.prepare("films") == []
    first = ledger.latent_set()
    assert ledger.prepare("another name") == []
    assert ledger.latent_set() == first
    assert first.name == "films"
    assert json.loads(store.read(CURRENT.set_key))["format_version"] == CURRENT.version


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "latentset", "format_version": 3, "name": "x"}', r"format version 3, this Lathe reads 1 to 2"),
        (b'{"cells": [], "nbformat": 4}', r"not Lathe's: found keys \['cells', 'nbformat'\]"),
        (b"[1]", r"not Lathe's: found list"),
        (b"\xff\x00", "not JSON"),
    ],
)
def test_a_foreign_output_is_refused(store: Store, content: bytes, message: str) -> None:
    store.write(CURRENT.set_key, content)
    with pytest.raises(OutputError, match=message):
        Ledger(store).prepare("films")
    assert store.read(CURRENT.set_key) == content


def test_prepare_races_end_with_one_uuid(store: Store) -> None:
    threads = [threading.Thread(target=Ledger(store).prepare, args=(f"n{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Ledger(store).latent_set().name in {f"n{n}" for n in range(8)}
    assert [info.key for info in store.list()] == [CURRENT.set_key]


# --- one shard, one receipt -------------------------------------------------------------------------------------------


def test_commit_read_done_all(store: Store, spool: Path) -> None:
    ledger = Ledger(store)
    made = [write_shard(store, spool, WriteConfig(), [latent_clip(n)], shard=n) for n in range(5)]
    assert ledger.done() == set()
    assert ledger.read(made[0].shard_id) is None
    for receipt in made:
        assert ledger.commit(receipt) == receipt
    assert ledger.done() == {receipt.shard_id for receipt in made}
    assert ledger.read(made[2].shard_id) == made[2]
    assert list(ledger.all()) == sorted(made, key=lambda receipt: receipt.shard_id)
    assert list(orphans(store)) == []


def test_the_second_attempt_gets_the_first_ones_receipt(store: Store, spool: Path) -> None:
    ledger = Ledger(store)
    first = write_shard(store, spool, WriteConfig(), [latent_clip(0)], attempt="a1")
    ledger.commit(first)
    with shard_writer(store, spool, WriteConfig(), attempt="a2") as writer:
        writer.add(latent_clip(0))
        files, stats = writer.finish()
        assert ledger.commit(receipt_of(files, stats, attempt="a2")).attempt == "a1"
        assert {info.key for info in orphans(store)} == {files[0].key, files[0].index_key}
        writer.abort()
    assert data_keys(store) == named_keys(first)


def test_committing_the_same_receipt_again_is_a_success(store: Store, spool: Path) -> None:
    receipt = write_shard(store, spool, WriteConfig(), [latent_clip(0)])
    assert Ledger(store).commit(receipt) == receipt
    assert Ledger(store).commit(receipt) == receipt


def attempt_in_process(root: str, spool: str, attempt: str, barrier: Any, wins: Any) -> None:
    """One process's attempt at shard 0: write, wait for the others, commit, clean up if not first."""
    race(local_store(Path(root)), Path(spool), attempt, barrier, wins)


def race(store: Store, spool: Path, attempt: str, barrier: Any, wins: Any) -> None:
    with shard_writer(store, spool, WriteConfig(), attempt=attempt) as writer:
        for n in range(3):
            writer.add(latent_clip(n))
        files, stats = writer.finish()
        barrier.wait(60)
        if Ledger(store).commit(receipt_of(files, stats, attempt=attempt)).attempt == attempt:
            wins.put(attempt)
        else:
            writer.abort()


def check_race(store: Store, winners: list[str]) -> None:
    assert len(winners) == 1
    (receipt,) = Ledger(store).all()
    assert receipt.attempt == winners[0]
    assert data_keys(store) == named_keys(receipt)


def test_processes_race_for_a_shard(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("race")
    barrier, wins = PROCESSES.Barrier(4), PROCESSES.Queue()
    names = [f"p{n}" for n in range(4)]
    racers = [
        PROCESSES.Process(
            target=attempt_in_process, args=(str(tmp_path / "out"), str(tmp_path / name), name, barrier, wins)
        )
        for name in names
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(90)
        assert racer.exitcode == 0
    check_race(store, [wins.get(timeout=5)] if wins.empty() is False else [])
    assert wins.empty()
    assert verify_output(store).ok


@pytest.mark.parametrize("turn", range(5))
def test_threads_race_for_a_shard(tmp_path: Path, turn: int) -> None:
    store = local_store(tmp_path / "out")
    check_race(store, race_in_threads([store] * 8, tmp_path))


def race_in_threads(stores: list[Store], folder: Path) -> list[str]:
    barrier, wins = threading.Barrier(len(stores)), PROCESSES.SimpleQueue()
    threads = [
        threading.Thread(target=race, args=(store, folder / f"t{n}", f"t{n}", barrier, wins))
        for n, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winners = []
    while not wins.empty():
        winners.append(wins.get())
    return winners


@pytest.mark.s3
def test_on_an_atomic_s3_a_race_has_one_winner(moto: S3Server, tmp_path: Path) -> None:
    stores = [open_store(f"{moto.root}/out", moto.config()) for _ in range(6)]
    assert Ledger(stores[0]).prepare("race") == []
    check_race(stores[0], race_in_threads(stores, tmp_path))


@pytest.mark.s3
def test_on_swift_a_shard_goes_from_writer_to_verified(s3: S3Server, tmp_path: Path) -> None:
    """Swift accepts If-None-Match but does not decide races with it: the receipt that is read back counts."""
    store = open_store(f"{s3.root}/out", s3.config())
    Ledger(store).prepare("swift")
    winners = race_in_threads([store, open_store(f"{s3.root}/out", s3.config())], tmp_path)
    (receipt,) = Ledger(store).all()
    assert receipt.attempt in winners
    second = write_shard(
        store, tmp_path / "s", WriteConfig(format="tar"), [latent_clip(n + 5) for n in range(3)], shard=1
    )
    assert Ledger(store).commit(second) == second
    assert Ledger(store).done() == {receipt.shard_id, second.shard_id}
    report = verify_output(store)
    assert (report.ok, report.shards, report.rows) == (True, 2, 6), report.problems
    assert named_keys(receipt) | named_keys(second) <= data_keys(store)


# --- stores that cannot refuse a second writer ------------------------------------------------------------------------


def test_without_conditional_writes_the_earliest_receipt_counts(tmp_path: Path, spool: Path) -> None:
    store = StoreWithoutConditions(str(tmp_path / "out"))
    ledger = Ledger(store)
    (notice,) = ledger.prepare("plain")
    assert "no conditional writes" in notice
    early = write_shard(
        store, spool, WriteConfig(), [latent_clip(0)], attempt="b", created="2026-01-01T00:00:00.000000+00:00"
    )
    late = write_shard(
        store, spool, WriteConfig(), [latent_clip(0)], attempt="a", created="2026-01-01T00:00:01.000000+00:00"
    )
    assert ledger.commit(late) == late
    assert ledger.commit(early) == early  # it started a second before: it counts from now on, for every reader
    assert ledger.read(early.shard_id) == early
    assert list(ledger.all()) == [early]
    assert ledger.done() == {early.shard_id}
    tied = replace(early, attempt="c", files=late.files)
    assert ledger.commit(tied) == early  # same time: the lower attempt
    assert {info.key for info in store.list("_receipts/")} == {
        f"_receipts/{early.shard_id}--a.json",
        f"_receipts/{early.shard_id}--b.json",
    }
    assert {info.key for info in orphans(store)} == named_keys(late)
    report = verify_output(store)
    assert report.ok
    assert any("2 receipts" in notice for notice in report.notices)


def test_both_naming_modes_are_read(tmp_path: Path, spool: Path) -> None:
    plain = StoreWithoutConditions(str(tmp_path / "out"))
    atomic = local_store(tmp_path / "out")
    first = Ledger(plain).commit(write_shard(plain, spool, WriteConfig(), [latent_clip(0)], shard=0))
    second = Ledger(atomic).commit(write_shard(atomic, spool, WriteConfig(), [latent_clip(1)], shard=1))
    assert Ledger(atomic).done() == Ledger(plain).done() == {first.shard_id, second.shard_id}


# --- counts -----------------------------------------------------------------------------------------------------------


def test_receipts_whose_counts_do_not_add_up_are_not_committed(store: Store, spool: Path) -> None:
    good = write_shard(store, spool, WriteConfig(), [latent_clip(0), latent_clip(1)])
    reject = Reject("k", "decode", "undecodable", "broken", policy=False)
    wrong = {
        "counts do not reconcile": replace(good, counts=replace(good.counts, samples=3)),
        "files hold 2 rows, counts say 3 clips": replace(good, counts=replace(good.counts, clips=3, clips_planned=3)),
        "files hold 34 frames": replace(good, counts=replace(good.counts, frames=33)),
        "only 0 rejects give a reason": replace(good, counts=replace(good.counts, samples=3, rejected=1)),
        "named twice": replace(good, files=tuple(replace(item, rows=1, frames=17) for item in good.files * 2)),
        "2 clips without statistics": replace(good, stats=None),
        "3 samples encoded, but only 2 clips": replace(good, counts=replace(good.counts, samples=3, encoded=3)),
    }
    for message, receipt in wrong.items():
        assert any(message in found for found in imbalances(receipt)), message
        with pytest.raises(BuildError, match="receipt refused"):
            Ledger(store).commit(receipt)
    assert Ledger(store).done() == set()
    rejected = replace(good, counts=replace(good.counts, samples=3, rejected=1), rejects=(reject,))
    assert imbalances(rejected) == []
    nothing = replace(good, files=(), counts=Counts(samples=1, rejected=1, damaged=1), rejects=(reject,), stats=None)
    assert Ledger(store).commit(nothing) == nothing  # a shard of which nothing could be used is done, too


@pytest.mark.parametrize("content", [b"[]", b'{"format_version": 1}', b'{"format_version": 7}'])
def test_json_that_is_not_a_receipt_of_this_format_is_named(store: Store, content: bytes) -> None:
    key = f"_receipts/{shard_of().id('f')}.json"
    store.write(key, content)
    with pytest.raises(OutputError, match=key):
        list(Ledger(store).all())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"\0\0\0"])
def test_a_cut_off_receipt_is_no_receipt(store: Store, spool: Path, content: bytes) -> None:
    receipt = write_shard(store, spool, WriteConfig(), [latent_clip(0)])
    ledger, key = Ledger(store), f"_receipts/{receipt.shard_id}.json"
    store.write(key, content)
    assert ledger.read(receipt.shard_id) is None
    assert list(ledger.all()) == []
    (problem,) = verify_output(store).problems[1:]  # the first: no _latentset.json
    assert "cut-off" in problem.found
    assert ledger.commit(receipt) == receipt
    assert list(ledger.all()) == [receipt]
    assert store.read(key) == content


def test_a_receipt_under_another_shards_name_is_refused(store: Store, spool: Path) -> None:
    receipt = write_shard(store, spool, WriteConfig(), [latent_clip(0)])
    store.write(f"_receipts/{'0' * 32}.json", receipt.to_json())
    with pytest.raises(OutputError, match="holds the receipt of shard"):
        Ledger(store).read("0" * 32)


def test_a_key_that_is_not_a_receipts_is_not_taken_for_one() -> None:
    shard = "0123456789abcdef" * 2
    assert CURRENT.receipt_name(CURRENT.receipt_key(shard)) == ReceiptName(shard, None)
    assert CURRENT.receipt_name(CURRENT.receipt_key(shard, "a_1-b")) == ReceiptName(shard, "a_1-b")
    for foreign in (
        f"_receipts/{shard[:-1]}.json",
        f"_receipts/{shard}.json~",
        f"_receipts/x/{shard}.json",
        f"_receipts/{shard}-a.json",
    ):
        assert CURRENT.receipt_name(foreign) is None


# --- kill -9 ----------------------------------------------------------------------------------------------------------

ROLLING = WriteConfig(row_group_bytes=64 * 1024, file_bytes=1024 * 1024)


def write_until_killed(root: str, spool: str, point: str | None, markers: str) -> None:
    """Writes shard 0 for ever (point None), or up to the drill that kills it."""
    drill = DrillConfig(point=point, marker_dir=markers)
    with shard_writer(local_store(Path(root)), Path(spool), ROLLING, attempt="dead", drill=drill) as writer:
        for n in range(100_000 if point is None else 4):
            writer.add(latent_clip(n, bucket=Bucket(17, 512, 512)))
        writer.finish()


@pytest.mark.parametrize("point", [None, "before_upload", "after_upload"])
def test_killed_in_the_middle_nothing_is_visible_and_a_second_attempt_is_whole(
    tmp_path: Path, point: str | None
) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("killed")
    args = (str(tmp_path / "out"), str(tmp_path / "dead"), point, str(tmp_path / "markers"))
    process = PROCESSES.Process(target=write_until_killed, args=args)
    process.start()
    if point is None:
        deadline = time.monotonic() + 60
        while not data_keys(store):  # at least one file is uploaded, another is being written
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert Ledger(store).done() == set()
    assert list(Ledger(store).all()) == []
    left = {info.key for info in orphans(store)}
    assert left == data_keys(store)
    assert bool(left) == (point != "before_upload")
    receipt = write_shard(store, tmp_path / "alive", ROLLING, [latent_clip(n) for n in range(4)], attempt="alive")
    assert Ledger(store).commit(receipt) == receipt
    report = verify_output(store)
    assert (report.ok, report.rows, report.orphans) == (True, 4, len(left))
    assert {info.key for info in orphans(store)} == left


# --- size -------------------------------------------------------------------------------------------------------------


def test_done_is_one_list_and_no_reads(tmp_path: Path) -> None:
    class Counting(LocalStore):
        lists, reads = 0, 0

        def list(self, prefix: str = "", *, recursive: bool = True) -> Any:
            self.lists += 1
            return super().list(prefix, recursive=recursive)

        def read(self, key: str) -> bytes:
            self.reads += 1
            return super().read(key)

    folder = tmp_path / "out" / "_receipts"
    folder.mkdir(parents=True)
    for n in range(20_000):
        (folder / f"{n:032x}.json").write_bytes(b"{" if n else b"")  # the first is empty: no receipt
    store = Counting(str(tmp_path / "out"))
    assert len(Ledger(store, layout=CURRENT).done()) == 19_999
    assert (store.lists, store.reads) == (1, 0)

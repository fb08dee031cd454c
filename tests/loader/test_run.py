"""A loader during a run: takedowns, ranks that share samples, other processes, its end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.config import WriteConfig
from pipeline.errors import ConfigError, OutputError
from pipeline.ledger.takedowns import TAKEDOWNS, record_takedown
from pipeline.loader import LatentDataset, LatentLoader, Pack, reading
from pipeline.loader.maker import BatchMaker
from pipeline.loader.order import Order
from pipeline.loader.reading import BatchReader
from pipeline.loader.slots import SlotFinder
from pipeline.storage.batched_reads import BatchedReads
from pipeline.storage.local import LocalStore
from pipeline.storage.range_reader import LocalRangeReader
from tests.loader.outputs import SHORT, clip_of, mixed_shards, write_output
from tests.pipeline.latent_clips import values_of


@pytest.fixture
def output(tmp_path):
    return write_output(tmp_path / "out", tmp_path, [[clip_of(100 * s + n, SHORT) for n in range(6)] for s in range(2)])


def in_child(function):
    """Exit code of a forked process that calls `function`: what it returns; of a signal if it hangs."""
    if not (process := os.fork()):
        signal.alarm(60)
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# ---- takedowns ---------------------------------------------------------------------------------------------------------


def test_takedowns_are_looked_for_beside_training_and_each_is_read_once(output, monkeypatch):
    reads, original = [], LocalStore.read

    def read(self, key, *arguments):
        if key.startswith(TAKEDOWNS):
            reads.append((key, threading.current_thread().name))
        return original(self, key, *arguments)

    monkeypatch.setattr(LocalStore, "read", read)
    dataset = LatentDataset.open(output.uri)
    gone = ["video00002-0000", "video00103-0000"]
    for name in gone:
        record_takedown(output.store, "asked", ids=[name])
    reads.clear()
    loader = LatentLoader(dataset, batch=2, takedowns_every_s=0)
    for _ in loader:
        if len(dataset.takedowns.records) == 2:
            break
    assert not set(gone) & {name for batch in islice(loader, 12) for name in batch.ids}
    loader.look_for_takedowns()
    assert len({key for key, _ in reads}) == len(reads) == 2
    assert all(thread.startswith("latents") for _, thread in reads)
    output.store.write(record_takedown(output.store, "asked", ids=["video00004-0000"]).key, b"{")
    with pytest.raises(OutputError, match="cannot be read as a takedown"):
        for _ in loader:
            pass


def test_rows_of_a_map_dataset_keep_their_numbers(output):
    dataset = LatentDataset.open(output.uri)
    rows = dataset.as_map_dataset()
    before = [rows[i]["id"] for i in range(len(rows))]
    record_takedown(output.store, "asked", ids=["video00001-0000"])
    LatentLoader(dataset, batch=2).look_for_takedowns()
    assert len(dataset) == 11
    for same in (rows, pickle.loads(pickle.dumps(rows))):  # noqa: S301
        assert [same[i]["id"] for i in range(len(same))] == before
    assert len(dataset.as_map_dataset()) == 11


# ---- ranks -------------------------------------------------------------------------------------------------------------


def rank_of_a_group(rank, store, uri, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD

    def opened(**options):
        return LatentLoader(LatentDataset.open(uri), batch=4, peers=group, **options)

    messages = []
    loader = opened(takedowns_every_s=0 if rank == 0 else 1e9)
    loader.check_ranks()
    for other in (opened(seed=rank), LatentLoader(LatentDataset.open(uri), batch=4, dp_world=1 + rank)):
        with pytest.raises(ConfigError) as found:
            other.check_ranks()
        messages.append(str(found.value))
    ids = [batch.ids for batch in islice(loader, 10)]
    dist.barrier()
    if rank == 0:
        record_takedown(LatentDataset.open(uri).store, "asked", ids=["video00001-0000", "video00102-0000"])
    ids += [batch.ids for batch in islice(loader, 110)]
    loader.look_for_takedowns()
    last = [batch.ids for batch in islice(loader, 20)]
    results.put((rank, ids, last, messages))
    dist.destroy_process_group()


def test_ranks_that_share_samples_apply_takedowns_at_the_same_step_and_compare_their_order(output, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=rank_of_a_group, args=(rank, tmp_path / "group", output.uri, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = dict((rank, rest) for rank, *rest in (results.get() for _ in ranks))
    for process in ranks:
        process.join()
    assert found[0] == found[1]
    assert not {"video00001-0000", "video00102-0000"} & {name for ids in found[0][1] for name in ids}
    assert "ranks read different orders: seed is 0 on rank 0 and 1 on rank 1" in found[0][2][0]
    assert "dp_world is 1 on rank 0 and 2 on rank 1" in found[0][2][1]


def test_orders_have_a_digest(output):
    def digest(**options):
        return LatentLoader(LatentDataset.open(output.uri), **{"batch": 2, **options}).order_digest

    assert digest() == digest(dp_world=2, dp_rank=1) != digest(seed=1)
    with pytest.raises(ConfigError, match="on_damage: expected stop with peers"):
        digest(peers="a group", on_damage="replace")
    LatentLoader(LatentDataset.open(output.uri), batch=2).check_ranks()  # without torch.distributed: nothing to compare


# ---- processes ---------------------------------------------------------------------------------------------------------


def test_a_forked_process_is_told_that_it_has_no_threads(output):
    loader = LatentLoader(LatentDataset.open(output.uri), batch=2)
    fresh = LatentLoader(LatentDataset.open(output.uri), batch=2)
    expected = next(iter(loader)).ids

    def used_in_child():
        with pytest.raises(ConfigError, match=r"reads in threads of process \d+, which process \d+ does not have"):
            next(iter(loader))
        with pytest.raises(ConfigError, match="in threads of process"):
            loader.peek(0)
        return 0 if next(iter(fresh)).ids == expected else 1

    assert in_child(used_in_child) == 0


@pytest.mark.parametrize("reader", ["map dataset", "dataset", "loader"])
def test_rows_are_read_in_a_forked_process_whatever_threads_held(output, reader):
    dataset = LatentDataset.open(output.uri, columns="width")
    rows, loader = dataset.as_map_dataset(), LatentLoader(dataset, batch=2)
    assert rows[0]["id"] == "video00000-0000"
    ids = next(iter(loader)).ids
    clip = output.clips["video00101-0000"]

    def read():
        if reader == "loader":
            return int(next(iter(LatentLoader(dataset, batch=2))).ids != ids)
        latent = rows[7]["latent"] if reader == "map dataset" else dataset.row(clip.id).latent
        return int(not np.array_equal(latent, values_of(clip.latent_CTHW, "float16")))

    with ExitStack() as held:
        for one in (dataset, rows._dataset):
            for lock in (one.indexes._lock, one.scalars._lock, one.fetcher._open._lock):
                held.enter_context(lock)
        assert in_child(read) == 0


@pytest.mark.parametrize("lock", ["reads", "batches", "ahead"])
def test_a_process_that_is_forked_beside_a_loader_ends_whatever_threads_held(output, lock):
    loader = LatentLoader(LatentDataset.open(output.uri), batch=2)
    next(iter(loader))
    ahead, holding, let_go = loader._ahead, threading.Event(), threading.Event()

    def hold():
        with {"reads": ahead.reads._shutdown_lock, "batches": ahead._plans._shutdown_lock, "ahead": ahead._lock}[lock]:
            holding.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(60)
    process = multiprocessing.get_context("fork").Process(target=signal.alarm, args=(60,))
    process.start()
    let_go.set()
    thread.join()
    process.join()
    assert process.exitcode == 0
    loader.close()


def test_what_was_to_be_read_is_not_waited_for_at_the_end(tmp_path, monkeypatch):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(100 * s, SHORT)] for s in range(12)])
    reading, may_read, reads = threading.Event(), threading.Event(), []

    def wait(original):
        def read(*arguments):
            reads.append(arguments)
            reading.set()
            assert may_read.wait(60)
            return original(*arguments)

        return read

    monkeypatch.setattr(LocalRangeReader, "read_into", wait(LocalRangeReader.read_into))
    monkeypatch.setattr(BatchedReads, "read", wait(BatchedReads.read))
    loader = LatentLoader(LatentDataset.open(output.uri), batch=12, epochs=9, prefetch=2, threads=1)

    def take():
        with suppress(CancelledError, ConfigError):
            next(iter(loader))

    step = threading.Thread(target=take)
    step.start()
    assert reading.wait(60)
    loader._ahead.stop()  # what the interpreter calls before it waits for the threads
    may_read.set()
    loader.close()
    step.join()
    assert len(reads) <= 2  # those that had begun, one for each batch


@pytest.mark.parametrize(
    ("part", "method"), [(BatchReader, "_fill"), (BatchMaker, "_read_columns"), (SlotFinder, "_indexes")]
)
def test_a_loader_that_is_stopped_before_its_reads_begin_says_that_it_was_cancelled(
    tmp_path, monkeypatch, part, method
):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(100 * s, SHORT)] for s in range(6)])
    loader = LatentLoader(LatentDataset.open(output.uri, columns="metadata"), batch=6, verify="always")
    monkeypatch.setattr(reading, "DISK_TASK_BYTES", 1)
    original = getattr(part, method)

    def stopped_before(*arguments, **options):
        if not options.get("held"):  # what is prepared ahead reads nothing
            loader._ahead.stop()
        return original(*arguments, **options)

    monkeypatch.setattr(part, method, stopped_before)
    with pytest.raises(CancelledError):
        next(iter(loader))


def test_the_order_is_asked_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """It remembers what it has found: asked by two threads at once it may find other batches or none ever after."""
    output = write_output(tmp_path / "out", tmp_path, mixed_shards())
    busy, met = threading.Lock(), []

    def alone(original):
        def call(*arguments):
            if not busy.acquire(blocking=False):
                met.append(original.__name__)
                return original(*arguments)
            try:
                time.sleep(0.005)
                return original(*arguments)
            finally:
                busy.release()

        return call

    loader = LatentLoader(LatentDataset.open(output.uri), batch=Pack(60, sequences=2), epochs=2, prefetch=4)
    for name in ("batch", "total"):
        monkeypatch.setattr(Order, name, alone(getattr(Order, name)))
    for step, _ in enumerate(loader):
        assert step < len(loader)
        loader.peek(step + 40)
        loader.stats()
    assert met == []


# ---- its end -----------------------------------------------------------------------------------------------------------


def test_a_closed_loader_says_so_and_is_not_pickled(output):
    with LatentLoader(LatentDataset.open(output.uri), batch=2) as loader:
        next(iter(loader))
        with pytest.raises(ConfigError, match="a loader cannot be pickled"):
            pickle.dumps(loader.as_iterable_dataset())
    with LatentLoader(LatentDataset.open(output.uri), batch=2, takedowns_every_s=0) as looking:
        pass
    for use in (lambda: next(iter(loader)), lambda: loader.peek(0), lambda: next(iter(looking))):
        with pytest.raises(ConfigError, match="this loader was closed"):
            use()


def test_steps_are_prepared_ahead_without_reading_indexes_for_rows_that_were_taken_down(tmp_path, monkeypatch):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards())
    loader = LatentLoader(LatentDataset.open(output.uri), batch=3, epochs=1, prefetch=1)
    ids = [batch.ids for batch in loader]
    planned = loader._planned
    assert (loader.peek(0), loader._planned) == (ids[0], planned)  # which are those of the last steps
    record_takedown(output.store, "asked", ids=[ids[2][0]])
    loader.look_for_takedowns()
    monkeypatch.setattr(
        loader._datasets[0].indexes, "get", None
    )  # of a replacement it would be called under the lock of all steps
    assert [loader._plan(step)[1] is None for step in range(4)] == [False, False, True, False]


def test_a_batch_that_its_user_changed_comes_unchanged_again(tmp_path):
    output = write_output(
        tmp_path / "out", tmp_path, mixed_shards(store=("first_frame",)), WriteConfig(store=("first_frame",))
    )
    loader = LatentLoader(LatentDataset.open(output.uri, columns="first_frame"), batch=3, epochs=2)
    *_, batch = islice(loader, 10)  # the first steps are not prepared: no index is in memory
    before = [*batch.ids], [*batch.captions], batch.fps.clone(), [*batch.columns["first_frame"]]
    batch.captions[0], batch.ids[1] = "", ""
    batch.fps.zero_()
    batch.columns.clear()
    loader.seek(9)
    again = next(iter(loader))
    assert (again.ids, again.captions, again.columns["first_frame"]) == (before[0], before[1], before[3])
    assert torch.equal(again.fps, before[2])

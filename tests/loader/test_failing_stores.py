"""What the loader does when a store fails for a while or for good: a mount of which every kind of read fails, S3 that does not answer."""

from __future__ import annotations

import copy
import errno
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import StorageConfig
from pipeline.errors import StorageUnavailable
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.loader.read_ahead import ReadAhead
from pipeline.loader.threads import Threads, threads
from pipeline.storage import patience
from pipeline.storage.batched_reads import BatchedReads
from pipeline.storage.local import LocalStore
from pipeline.storage.local_errors import translated
from pipeline.storage.range_reader import LocalRangeReader
from tests.loader.outputs import mixed_shards, write_output


@pytest.fixture
def failing(monkeypatch):
    """Makes the next reads of local files fail; a list of errors to raise, one a read."""
    for other in list(ReadAhead._living):  # reads ahead of loaders that tests left behind would take the errors
        other.close()
    errors, original, together = [], LocalRangeReader.read_into, BatchedReads.read

    def read_into(self, start, buffers):
        if errors:
            raise errors.pop()
        return original(self, start, buffers)

    monkeypatch.setattr(LocalRangeReader, "read_into", read_into)
    monkeypatch.setattr(BatchedReads, "read", lambda *given: [False] * len(given[1]) if errors else together(*given))
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    return errors


def test_reads_that_fail_for_a_while_are_tried_again(films, failing):
    failing += [StorageUnavailable("no route to host")] * 7
    loader = LatentLoader(LatentDataset.open(films["parquet"].uri), batch=3, epochs=1, threads=1)
    assert len(list(loader)) == 15
    assert loader.stats()["retries"] == 7


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("method", ["read", "read_range", "open_reader"])
def test_a_mount_that_fails_once_ends_no_run_whatever_was_read(films, failing, monkeypatch, kind, method):
    dataset, original, left = LatentDataset.open(films[kind].uri, columns="metadata"), getattr(LocalStore, method), [2]

    def stale(self, key, *arguments):  # `read` reads indexes, `read_range` columns, `open_reader` begins with tensors
        if not key.startswith("_takedowns") and left[0]:
            left[0] -= 1
            with translated(self.uri(key)):
                raise OSError(errno.ESTALE, "Stale file handle")
        return original(self, key, *arguments)

    monkeypatch.setattr(LocalStore, method, stale)
    loader = LatentLoader(dataset, batch=3, epochs=1)
    assert len(list(loader)) == 15
    assert (left, loader.stats()["retries"]) == ([0], 2)


def test_a_mount_that_fails_once_while_takedowns_are_looked_for_ends_no_run(films, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    dataset, original, left = LatentDataset.open(films["parquet"].uri), LocalStore.list, [1]

    def stale(self, prefix="", **options):
        if prefix.startswith("_takedowns") and left[0]:
            left[0] -= 1
            raise StorageUnavailable("Stale file handle")
        return original(self, prefix, **options)

    monkeypatch.setattr(LocalStore, "list", stale)
    dataset.look_for_takedowns()
    assert left == [0]


@pytest.mark.parametrize("options", [{}, {"where": "caption like '%1%'", "columns": "width"}, {"receipts": True}])
def test_a_mount_that_fails_once_while_a_dataset_is_opened_is_asked_again(films, monkeypatch, options):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    calls, failing = [], []

    def failing_once(original):
        def call(self, *arguments, **given):
            calls.append(original.__name__)
            if len(calls) in failing:
                with translated(self.root):
                    raise OSError(errno.ESTALE, "Stale file handle")
            return original(self, *arguments, **given)

        return call

    for method in ("read", "read_range", "list", "keys", "stat", "exists"):
        monkeypatch.setattr(LocalStore, method, failing_once(getattr(LocalStore, method)))
    uri = Path(films["parquet"].uri)
    expected, count = sorted(row.id for row in LatentDataset.open(uri, **options).rows(tensors=False)), len(calls)
    for number in range(1, count + 1):
        failing[:], calls[:] = [number], []
        assert sorted(row.id for row in LatentDataset.open(uri, **options).rows(tensors=False)) == expected
        assert len(calls) > count


def test_an_error_while_a_dataset_is_opened_does_not_wait_for_its_threads(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1e9)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 1e9)
    store, pausing = LocalStore("/", StorageConfig(patience_s=1e9)), threading.Event()

    def read():
        pausing.set()
        raise StorageUnavailable("no route to host")

    asked = []

    def opening():
        with threads(2, "opening") as pool:
            asked.append(pool.submit(store.patiently, read))
            assert pausing.wait(300)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opening()
    with pytest.raises(CancelledError):
        asked[0].result()


def test_a_store_that_stays_away_ends_the_run_with_file_and_range(films, failing):
    failing += [StorageUnavailable("no route to host")] * 99
    dataset = LatentDataset.open(films["parquet"].uri, storage=StorageConfig(max_attempts=3))
    loader = LatentLoader(dataset, batch=3, epochs=1, prefetch=1)
    where = r"/data/f0e1d2c3/.*parquet bytes \d+ to \d+ could not be read"
    with pytest.raises(StorageUnavailable, match=rf"{where}: no route to host for .* s \(3 tries\)"):
        next(iter(loader))
    assert loader.stats()["retries"] == 2
    failing.clear()
    assert len(list(loader)) == 15  # from the step that failed


@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.s3)])
def test_a_loader_that_is_closed_does_not_wait_for_a_store_that_is_away(
    films, failing, monkeypatch, request, tmp_path, remote
):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1e9)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 1e9)
    output, storage = films["parquet"], StorageConfig(patience_s=1e9)
    if remote:
        s3 = request.getfixturevalue("s3")
        storage = s3.config(patience_s=1e9)
        output = write_output(f"{s3.root}/out", tmp_path, mixed_shards(1), storage=storage)
    dataset = LatentDataset.open(output.uri, storage=storage)
    if remote:
        dataset.store._config = storage.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
        patience.mark_reached(dataset.store._config)
    else:
        failing += [StorageUnavailable("no route to host")] * 99
    pausing, wait = threading.Event(), patience.Patience._wait

    def waits(*arguments):
        pausing.set()
        wait(*arguments)

    monkeypatch.setattr(patience.Patience, "_wait", waits)
    loader, ended = LatentLoader(dataset, batch=3, epochs=1), []

    def take():
        with pytest.raises(CancelledError):
            next(iter(loader))
        ended.append(True)

    step = threading.Thread(target=take)
    step.start()
    assert pausing.wait(300)
    loader.close()
    step.join()
    assert ended


class RemoteStore(LocalStore):
    """A folder whose requests pause by themselves, as those of an object store do, while it is `away`."""

    def __init__(self, root):
        super().__init__(root)
        self.away, self.pausing = False, threading.Event()

    def patiently(self, read):
        return read()

    def read_range(self, key, start, length, *, etag=None):
        pause = patience.Patience(1e9)
        while self.away:
            self.pausing.set()
            pause.again("did not answer")
        return super().read_range(key, start, length, etag=etag)


@pytest.mark.parametrize("columns", [("width",), ("width", "height")])
def test_a_loader_that_is_closed_does_not_wait_for_columns(films, monkeypatch, columns):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1e9)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 1e9)
    dataset = LatentDataset.open(films["parquet"].uri, columns=columns)
    dataset.store = store = RemoteStore(dataset.store.root)
    dataset = copy.copy(dataset)  # whose readers take the store that it has now
    loader, opened = LatentLoader(dataset, batch=3, epochs=1), pq.ParquetFile.read

    def read(file, names, **options):
        store.away = names == list(columns)  # not for indexes, and not before the footer was read
        return opened(file, names, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(lambda: next(iter(loader)))
        assert store.pausing.wait(300)
        loader.close()
        with pytest.raises(CancelledError):
            step.result()


def test_threads_that_read_ahead_for_a_thread_end_their_pauses_with_it(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1e9)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 1e9)
    stopped, pausing = threading.Event(), threading.Event()

    def read(_):
        pausing.set()
        patience.Patience(1e9).again("did not answer")

    with Threads(1, "latents", stopped) as pool:
        looking = pool.submit(lambda: list(mapped_ahead(read, range(9), 2, "takedowns")))
        assert pausing.wait(300)
        stopped.set()
        with pytest.raises(CancelledError):
            looking.result()

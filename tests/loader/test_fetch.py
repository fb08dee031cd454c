"""Ranged reads: which tensors are read together, what lies between them, reads that the system cuts short, files kept open."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.errors import AccessError, NotFound
from pipeline.loader import LatentDataset, LatentLoader, open_files, reading
from pipeline.loader.fetch import GAP_BYTES, READ_BYTES, Fetcher, Wanted, spans_of
from pipeline.storage.batched_reads import BatchedReads
from pipeline.storage.range_reader import LocalRangeReader
from tests.pipeline.latent_clips import local_store


def wanted(*ranges):
    return [Wanted(file, offset, length, None, 0, 0, place) for place, (file, offset, length) in enumerate(ranges)]


def memory_of(items):
    return [memoryview(bytearray(item.length)) for item in items]


def test_tensors_near_each_other_are_read_together():
    found = spans_of(
        wanted(
            (1, 0, 10),
            (0, 500, 10),
            (0, 100, 400),  # touches the next
            (0, 510 + GAP_BYTES, 5),  # just near enough
            (0, 516 + 2 * GAP_BYTES, 5),  # one byte too far
            (2, 0, READ_BYTES - 100),
            (2, READ_BYTES - 100, 200),  # too much at once
        )
    )
    assert [(span.file, span.start, span.stop, len(span.members)) for span in found] == [
        (0, 100, 515 + GAP_BYTES, 3),
        (0, 516 + 2 * GAP_BYTES, 521 + 2 * GAP_BYTES, 1),
        (1, 0, 10, 1),
        (2, 0, READ_BYTES - 100, 1),
        (2, READ_BYTES - 100, READ_BYTES + 100, 1),
    ]
    twice = spans_of(wanted((0, 10, 5), (0, 10, 5)))  # a row may be in a batch twice
    assert [len(span.members) for span in twice] == [1, 1]


@pytest.fixture
def file(tmp_path):
    """A fetcher of one file of random bytes, and the bytes."""
    data = np.random.default_rng(0).bytes(300_000)
    store = local_store(tmp_path)
    store.write("file", data)
    return Fetcher(store, SimpleNamespace(value=lambda column, number: "file" if number == 0 else "gone")), data


@pytest.mark.parametrize("most", [None, 7, 70_000])
def test_every_tensor_gets_its_bytes_also_where_the_system_reads_less_than_asked(file, monkeypatch, most):
    fetcher, data = file
    original = os.preadv

    def short(descriptor, buffers, offset):
        if most is None:
            return original(descriptor, buffers, offset)
        return original(descriptor, [buffers[0][: min(most, len(buffers[0]))]], offset)

    monkeypatch.setattr(os, "preadv", short)
    items = wanted((0, 5, 1000), (0, 1005, 10), (0, 2000, 3), (0, 200_000, 90_000))
    memory = memory_of(items)
    for span in spans_of(items):
        assert fetcher.read([span], memory) == []
    for item, view in zip(items, memory, strict=True):
        assert bytes(view) == data[item.offset : item.stop]


def test_a_file_that_ends_too_early_says_which_tensors_are_cut(file):
    fetcher, data = file
    items = wanted((0, 299_000, 500), (0, 299_600, 500), (0, 300_200, 5))
    (span,), memory = spans_of(items), memory_of(items)
    assert [item.offset for item in fetcher.read([span], memory)] == [299_600, 300_200]
    assert bytes(memory[0]) == data[299_000:299_500]
    with pytest.raises(NotFound, match="gone does not exist"):
        fetcher.read(spans_of(wanted((1, 0, 5))), memory)


def test_errors_of_the_system_name_the_file(file, monkeypatch):
    fetcher, _ = file

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "preadv", refused)
    with pytest.raises(AccessError, match=r"/file cannot be read: Permission denied"):
        fetcher.read(spans_of(wanted((0, 0, 5))), [memoryview(bytearray(5))])


def test_few_files_stay_open(films, monkeypatch):
    monkeypatch.setattr(open_files, "LEAST", 2)
    monkeypatch.setattr(open_files.OpenFiles, "_most", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = LatentDataset.open(films["parquet"].uri)
    with LatentLoader(dataset, batch=3, epochs=2) as loader:
        assert len(list(loader)) == 30
        assert len(dataset.fetcher._open) == 2
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(("slow", "verify"), [(False, "never"), (True, "never"), (False, "always")])
def test_reads_from_memory_stay_in_one_thread_others_are_spread(films, monkeypatch, slow, verify):
    threads = set()

    def named(original):
        def read(*arguments):
            threads.add(threading.current_thread().name.rpartition("_")[0])
            return original(*arguments)

        return read

    monkeypatch.setattr(LocalRangeReader, "read_into", named(LocalRangeReader.read_into))
    monkeypatch.setattr(BatchedReads, "read", named(BatchedReads.read))
    monkeypatch.setattr(reading, "DISK_TASK_BYTES", 1)
    monkeypatch.setattr(reading, "DISK_PACE", -1.0 if slow else 1e9)
    with LatentLoader(LatentDataset.open(films["parquet"].uri), batch=3, epochs=1, verify=verify) as loader:
        assert len(list(loader)) == 15
    assert threads == ({"batches", "latents"} if slow or verify == "always" else {"batches"})

"""Files that the loader keeps open: never closed under a read, never more than the process may have."""

from __future__ import annotations

import gc
import os
import resource
import threading
from contextlib import suppress

import numpy as np
import pytest

from pipeline.errors import AccessError
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.loader.open_files import MOST, OpenFiles
from pipeline.loader.read_ahead import ReadAhead
from pipeline.storage.batched_reads import BatchedReads
from pipeline.storage.range_reader import LocalRangeReader
from tests.loader.outputs import SHORT, clip_of, write_output
from tests.pipeline.latent_clips import values_of


def test_closing_a_loader_or_a_dataset_leaves_the_reads_of_others_whole(films, tmp_path, monkeypatch):
    """A read goes on after its file was closed and another file got its number: it must not return bytes of that one."""
    reading, may_read = threading.Event(), threading.Event()

    def wait(original):
        def read(*arguments):
            reading.set()
            assert may_read.wait(60)
            return original(*arguments)

        return read

    dataset = LatentDataset.open(films["parquet"].uri)
    training = LatentLoader(dataset, batch=3, threads=1, prefetch=1)
    monkeypatch.setattr(LocalRangeReader, "read_into", wait(LocalRangeReader.read_into))
    monkeypatch.setattr(BatchedReads, "read", wait(BatchedReads.read))
    batches = iter(training)
    found = []
    step = threading.Thread(target=lambda: found.append(next(batches)))
    step.start()
    assert reading.wait(60)
    LatentLoader(dataset, batch=3).close()
    dataset.close()
    (tmp_path / "other").write_bytes(bytes(1 << 16))
    others = [os.open(tmp_path / "other", os.O_RDONLY) for _ in range(64)]
    may_read.set()
    step.join()
    for other in others:
        os.close(other)
    for value, name in zip(found[0].latents, found[0].ids, strict=True):
        assert np.array_equal(value.float().numpy(), values_of(films["parquet"].clips[name].latent_CTHW, "float16"))
    assert len(next(batches)) == 3


@pytest.fixture
def few_files():
    """Sets how many more files the process may open."""
    before, most, taken = resource.getrlimit(resource.RLIMIT_NOFILE), OpenFiles._most, []

    for other in list(ReadAhead._living):  # loaders that tests left behind would close files meanwhile
        other.close()

    def allow(more):
        gc.collect()
        last = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + more, before[1]))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(more):
            os.close(taken.pop())

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    OpenFiles._most = most
    for descriptor in taken:
        os.close(descriptor)


def test_more_files_than_the_process_may_open_are_read_in_turn(tmp_path, few_files):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(100 * s, SHORT)] for s in range(24)])
    dataset = LatentDataset.open(output.uri)
    loader = LatentLoader(dataset, batch=2, epochs=2, threads=2, prefetch=2)
    few_files(9)
    assert len(list(loader)) == 24
    loader.close()
    dataset.close()
    few_files(0)
    with pytest.raises(AccessError, match=r"cannot be opened: Too many open files; raise the limit .*ulimit -n"):
        list(dataset.rows())


def test_datasets_share_half_of_the_files_that_a_process_may_open(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, 4096))
    monkeypatch.setattr(OpenFiles, "_living", {OpenFiles(), OpenFiles()})
    monkeypatch.setattr(OpenFiles, "_most", MOST)
    one = next(iter(OpenFiles._living))
    for number in range(100):
        one.get(number, object)
    assert len(one) == 32

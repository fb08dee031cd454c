"""Local copies of tensors: the budget holds with several processes, nothing partial or foreign is ever read."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.loader import LatentDataset, LatentLoader, TensorCache
from pipeline.loader.cache import SCRATCH, SCRATCH_S, parse_bytes


def name_of(n):
    return f"{n:032x}"


def held(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and len(path.name) == 32)


def content(n, size=1000):
    return memoryview(bytearray(np.random.default_rng(n).bytes(size)))


def test_a_copy_is_read_back_or_is_not_there(tmp_path):
    cache, view = TensorCache(tmp_path, "1MB"), memoryview(bytearray(1000))
    assert not cache.read(name_of(1), view)
    cache.put(name_of(1), content(1))
    assert TensorCache(tmp_path, "1MB").read(name_of(1), view)
    assert view == content(1)
    assert not cache.read(name_of(1), memoryview(bytearray(999)))
    with open(tmp_path / "00" / name_of(1), "r+b") as file:
        file.truncate(500)
    assert not cache.read(name_of(1), view)
    cache.forget(name_of(1))
    cache.forget(name_of(1))
    assert held(tmp_path) == 0


def test_the_copies_that_were_read_longest_ago_go_first(tmp_path):
    cache = TensorCache(tmp_path, 20_000)
    for n in range(18):
        cache.put(name_of(n), content(n))
        os.utime(tmp_path / "00" / name_of(n), (n + 1, n + 1))
    assert cache.read(name_of(0), memoryview(bytearray(1000)))  # is now the newest
    for n in range(18, 30):
        cache.put(name_of(n), content(n))
    assert held(tmp_path) <= 20_000
    left = {int(path.name, 16) for path in (tmp_path / "00").iterdir()}
    assert 0 in left
    assert not {1, 2, 3} & left
    assert {27, 28, 29} <= left
    cache.put(name_of(99), content(99, 19_000))  # larger than what trimming leaves
    assert not (tmp_path / "00" / name_of(99)).exists()


def test_a_deleted_folder_is_made_again_and_foreign_files_are_left_alone(tmp_path):
    folder = tmp_path / "copies"
    cache, view = TensorCache(folder, 20_000), memoryview(bytearray(1000))
    cache.put(name_of(1), content(1))
    shutil.rmtree(folder)
    assert not cache.read(name_of(1), view)
    cache.put(name_of(1), content(1))
    assert cache.read(name_of(1), view)
    (folder / ".bytes").unlink()
    foreign = [folder / "README", folder / "ab", folder / "00" / "notes.txt", folder / ".bytes"]
    for path in foreign:
        path.write_text("x")
        os.utime(path, (1, 1))
    for n in range(40):
        cache.put(name_of(n), content(n))
    assert cache.read(name_of(39), view)
    assert 10_000 < held(folder) <= 20_000
    assert all(path.exists() for path in foreign)
    TensorCache(folder, 5000)
    assert held(folder) <= 5000


def test_copies_are_written_while_they_fit_into_the_budget_to_the_byte(tmp_path):
    caches = [TensorCache(tmp_path, 6000) for _ in range(4)]
    for n in range(60):
        caches[n % 4].put(name_of(n), content(n, 1056))
        assert held(tmp_path) <= 6000


def fill(folder, start):
    cache = TensorCache(folder, 50_000)
    for n in range(start, start + 150):
        cache.put(name_of(n), content(n))
        view = memoryview(bytearray(1000))
        if cache.read(name_of(n // 2), view) and view != content(n // 2):
            os._exit(3)


def test_processes_that_share_a_folder_stay_within_the_budget(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, 100 * k)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert held(tmp_path) <= 50_000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(SCRATCH)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    old, new = tmp_path / f"{SCRATCH}old", tmp_path / f"{SCRATCH}new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - SCRATCH_S - 9,) * 2)
    TensorCache(tmp_path, "1MB")
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(("text", "found"), [("200GB", 200 * 10**9), ("1.5 KiB", 1536), (7, 7), ("64mib", 64 * 2**20)])
def test_sizes_are_read(text, found):
    assert parse_bytes(text) == found


def test_what_cannot_be_a_cache_is_refused(tmp_path):
    for text in ("many", "-3", "0", "3XB", ""):
        with pytest.raises(ConfigError, match="cache: expected a number of bytes such as 200GB"):
            TensorCache(tmp_path, text)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cache: .*file cannot be used: .*; name another folder"):
        TensorCache(tmp_path / "file", 1000)


def test_epochs_after_the_first_come_from_the_cache(films, tmp_path):
    cache = TensorCache(tmp_path, "10MB")
    loader = LatentLoader(LatentDataset.open(films["parquet"].uri), batch=3, epochs=3, cache=cache, prefetch=1)
    whole = {name: value.clone() for batch in loader for name, value in zip(batch.ids, batch.latents, strict=True)}
    assert (loader.stats()["tensors"], loader.stats()["cache_misses"], loader.stats()["cache_hits"]) == (45, 45, 90)
    path = next(path for path in tmp_path.rglob("*") if len(path.name) == 32)
    path.write_bytes(bytes(path.stat().st_size))
    checked = LatentLoader(LatentDataset.open(films["parquet"].uri), batch=3, epochs=1, cache=cache)
    for batch in checked:
        assert all(whole[name].equal(value) for name, value in zip(batch.ids, batch.latents, strict=True))
    assert (checked.stats()["tensors"], checked.stats()["cache_hits"]) == (1, 44)

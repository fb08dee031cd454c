"""Each source counts once, however runs listed, grouped, lost, restored or touched it, and however they interleaved."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import resolve_inputs
from pipeline.engine.driver.coverage import find_work
from pipeline.errors import OutputError
from pipeline.ledger.counted import counted_receipts
from pipeline.ledger.summaries import Summaries
from pipeline.records import Counts
from pipeline.storage.local import LocalStore
from tests.pipeline.frameless_build import (
    FINGERPRINT,
    Careless,
    NoConditions,
    Run,
    job_for,
    totals,
    touch,
    visible,
)


def test_a_run_over_a_subset_between_two_full_runs_doubles_nothing(world):
    world.run("abc")  # planned and killed before its first receipt
    world.run("a").finish()
    world.run("abc").finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")
    assert world.run("abc").todo == []


def test_file_that_was_removed_and_restored_is_not_encoded_again(world):
    world.run("abc").finish()
    assert world.run("ac").todo == []
    assert world.run("abc").todo == []


def test_other_group_sizes_give_the_same_rows(world):
    world.run("abcdef", "storage.files_per_shard=4").step()
    world.run("cdef", "storage.files_per_shard=1").finish()
    assert world.run("abcdef", "storage.files_per_shard=2").todo == []
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abcdef")


def test_groups_end_at_their_bytes(world):
    assert len(world.run("abcdef", "storage.shard_bytes=30").todo) == 2
    assert len(world.run("abcdef", "storage.shard_bytes=1").todo) == 6


@pytest.mark.parametrize("kind", [LocalStore, NoConditions, Careless])
def test_two_runs_at_once_with_other_groups_count_each_source_once(world, kind, tmp_path):
    world.store = kind(str(tmp_path / "out"))
    job = job_for(tmp_path / "out")
    paths = [str(world.folder / f"{name}.mp4") for name in "abcdef"]
    first = Run(world.store, paths[:5], world.spool, job_for(tmp_path / "out", "storage.files_per_shard=2"))
    second = Run(world.store, paths, world.spool, job_for(tmp_path / "out", "storage.files_per_shard=3"))
    while first.step() | second.step():
        pass
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abcdef")
    assert totals(world.store) == Counts(6, 6, 0, 6, 6, 0, 30)
    assert Run(world.store, paths, world.spool, job).todo == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"format_version": 1, "sha', b"\xff\xfe", b"\0" * 40])
def test_truncated_receipt_is_ignored_and_replaced_by_the_next_run(world, content):
    (shard,) = world.run("ab").todo
    key = f"_receipts/{shard.id(FINGERPRINT)}.json"
    world.store.write(key, content)
    assert world.run("ab").finish().committed
    assert world.store.read(key) == content  # never replaced: two attempts that both replace it could undo each other
    assert world.run("ab").todo == []
    assert Counter(row.source_key for row in visible(world.store)) == Counter("ab")


def test_a_receipt_of_another_format_is_refused_not_redone(world):
    (shard,) = world.run("ab").todo
    world.store.write(f"_receipts/{shard.id(FINGERPRINT)}.json", b'{"format_version": 7}')
    with pytest.raises(OutputError, match="format version 7"):
        world.run("ab")


def test_a_touched_file_is_not_encoded_again_and_not_hashed_twice(world, monkeypatch):
    world.run("abc").finish()
    touch(world.folder / "b.mp4")
    again = world.run("abc")
    assert again.todo == []
    assert any("1 inputs have a new modification time" in text for text in again.work.notices)
    assert [row.source_key for row in visible(world.store)] == ["a", "b", "c"]
    assert world.run("abc").work.touched == {}
    assert totals(world.store).samples == 3


def test_a_changed_file_is_new_work_and_an_old_content_that_returns_is_not(world):
    path = world.folder / "b.mp4"
    before = path.read_bytes()
    world.run("abc").finish()
    path.write_bytes(b"B" * 10)
    touch(path)
    assert [len(shard.objects) for shard in world.run("abc").finish().work.todo(StorageConfig())] == [1]
    path.write_bytes(before)
    os.utime(path, ns=(5, 5))
    assert world.run("abc").todo == []
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abbc")  # both contents, each once


def test_a_file_touched_between_two_runs_that_both_encode_it_counts_once(world):
    first = world.run("ab")
    touch(world.folder / "b.mp4")
    second = world.run("ab")
    os.utime(world.folder / "b.mp4", ns=(0, int(first.todo[0].objects[1].etag.partition("-")[0])))
    first.finish()
    touch(world.folder / "b.mp4")
    second.finish()
    assert [len(part.receipt.shard.objects) for part in counted_receipts(world.store)] == [2, 2]
    assert Counter(row.source_key for row in visible(world.store)) == Counter("ab")
    assert totals(world.store).samples == 2


def test_changed_settings_give_a_notice(world):
    world.run("ab").finish()
    assert any("stored as parquet" in text for text in world.run("ab", **{"write.format": "tar"}).work.notices)
    job = job_for(Path(world.store.root))
    work = find_work(resolve_inputs([str(world.folder)], job.storage), Summaries(world.store).all(), "e" * 32, job)
    assert any("encoded before with other settings" in text for text in work.notices)
    assert len(work.files) == 6

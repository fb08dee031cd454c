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


def test_a_run_over_a_subset_between_two_full_runs_doubles_nothing(workspace):
    workspace.run("abc")  # planned and killed before its first receipt
    workspace.run("a").finish()
    workspace.run("abc").finish()
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abc")
    assert workspace.run("abc").todo == []


def test_file_that_was_removed_and_restored_is_not_encoded_again(workspace):
    workspace.run("abc").finish()
    assert workspace.run("ac").todo == []
    assert workspace.run("abc").todo == []


def test_other_group_sizes_give_the_same_rows(workspace):
    workspace.run("abcdef", "storage.files_per_shard=4").step()
    workspace.run("cdef", "storage.files_per_shard=1").finish()
    assert workspace.run("abcdef", "storage.files_per_shard=2").todo == []
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abcdef")


def test_groups_end_at_their_bytes(workspace):
    assert len(workspace.run("abcdef", "storage.shard_bytes=30").todo) == 2
    assert len(workspace.run("abcdef", "storage.shard_bytes=1").todo) == 6


@pytest.mark.parametrize("kind", [LocalStore, NoConditions, Careless])
def test_two_runs_at_once_with_other_groups_count_each_source_once(workspace, kind, tmp_path):
    workspace.store = kind(str(tmp_path / "out"))
    job = job_for(tmp_path / "out")
    paths = [str(workspace.folder / f"{name}.mp4") for name in "abcdef"]
    first = Run(workspace.store, paths[:5], workspace.spool, job_for(tmp_path / "out", "storage.files_per_shard=2"))
    second = Run(workspace.store, paths, workspace.spool, job_for(tmp_path / "out", "storage.files_per_shard=3"))
    while first.step() | second.step():
        pass
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abcdef")
    assert totals(workspace.store) == Counts(6, 6, 0, 6, 6, 0, 30)
    assert Run(workspace.store, paths, workspace.spool, job).todo == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"format_version": 1, "sha', b"\xff\xfe", b"\0" * 40])
def test_truncated_receipt_is_ignored_and_replaced_by_the_next_run(workspace, content):
    (shard,) = workspace.run("ab").todo
    key = f"_receipts/{shard.id(FINGERPRINT)}.json"
    workspace.store.write(key, content)
    assert workspace.run("ab").finish().committed
    assert (
        workspace.store.read(key) == content
    )  # never replaced: two attempts that both replace it could undo each other
    assert workspace.run("ab").todo == []
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("ab")


def test_a_receipt_of_another_format_is_refused_not_redone(workspace):
    (shard,) = workspace.run("ab").todo
    workspace.store.write(f"_receipts/{shard.id(FINGERPRINT)}.json", b'{"format_version": 7}')
    with pytest.raises(OutputError, match="format version 7"):
        workspace.run("ab")


def test_a_touched_file_is_not_encoded_again_and_not_hashed_twice(workspace, monkeypatch):
    workspace.run("abc").finish()
    touch(workspace.folder / "b.mp4")
    again = workspace.run("abc")
    assert again.todo == []
    assert any("1 input has a new modification time" in text for text in again.work.notices)
    assert [row.source_key for row in visible(workspace.store)] == ["a", "b", "c"]
    assert workspace.run("abc").work.touched == {}
    assert totals(workspace.store).samples == 3


def test_a_changed_file_is_new_work_and_an_old_content_that_returns_is_not(workspace):
    path = workspace.folder / "b.mp4"
    before = path.read_bytes()
    workspace.run("abc").finish()
    path.write_bytes(b"B" * 10)
    touch(path)
    assert [len(shard.objects) for shard in workspace.run("abc").finish().work.todo(StorageConfig())] == [1]
    path.write_bytes(before)
    os.utime(path, ns=(5, 5))
    assert workspace.run("abc").todo == []
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abbc")  # both contents, each once


def test_a_file_touched_between_two_runs_that_both_encode_it_counts_once(workspace):
    first = workspace.run("ab")
    touch(workspace.folder / "b.mp4")
    second = workspace.run("ab")
    os.utime(workspace.folder / "b.mp4", ns=(0, int(first.todo[0].objects[1].etag.partition("-")[0])))
    first.finish()
    touch(workspace.folder / "b.mp4")
    second.finish()
    assert [len(part.receipt.shard.objects) for part in counted_receipts(workspace.store)] == [2, 2]
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("ab")
    assert totals(workspace.store).samples == 2


def test_changed_settings_give_a_notice(workspace):
    workspace.run("ab").finish()
    assert any("stored as parquet" in text for text in workspace.run("ab", **{"write.format": "tar"}).work.notices)
    job = job_for(Path(workspace.store.root))
    work = find_work(
        resolve_inputs([str(workspace.folder)], job.storage), Summaries(workspace.store).all(), "e" * 32, job
    )
    assert [len(receipts) for receipts in work.others.values()] == [1]
    assert len(work.files) == 6

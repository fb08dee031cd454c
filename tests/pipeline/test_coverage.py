"""Each source counts once, whatever runs listed, grouped, lost, restored or touched, and however they interleaved.

`Run` is a build without frames: it lists real files, finds its work, and commits receipts with real side indexes, one step at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EncodeJob, StorageConfig, build_job
from pipeline.corpus import resolve_inputs
from pipeline.counted import counted_receipts, shares, shown
from pipeline.coverage import find_work, retry_work, without_unchanged
from pipeline.errors import OutputError
from pipeline.receipts import Ledger
from pipeline.records import FORMAT_VERSION, ChannelStats, Counts, Receipt, Reject, SourceObject, Timings, WrittenFile
from pipeline.storage.local import LocalStore
from pipeline.summaries import PREFIX as SUMMARIES
from pipeline.summaries import Summaries
from pipeline.unchanged import find_unchanged, record_unchanged
from pipeline.writer.index_file import IndexRow, read_index, write_index

FINGERPRINT = "f" * 32
STATS = ChannelStats(1, (0.0,), (0.0,), (0.0,), (0.0,))
ticks = itertools.count()


class NoConditions(LocalStore):
    """A store that says that it has no conditional writes."""

    def conditional_writes(self) -> bool:
        return False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


class Careless(LocalStore):
    """A store that claims conditional writes and replaces what is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


def job_for(output: Path, *overrides: str, **flags: object) -> EncodeJob:
    return build_job({"inputs": ["."], "output": str(output), **flags}, overrides=overrides)


def row_id(uri: str, etag: str) -> str:
    return hashlib.blake2b(f"{uri}{etag}".encode(), digest_size=8).hexdigest()


def commit(store: LocalStore, job: EncodeJob, shard, spool: Path, rejected: dict[str, str] | None = None) -> Receipt:
    """An attempt at a shard of plain files: a row a file, or the reject that `rejected` (stem -> reason) says; then the receipt."""
    attempt = f"{next(ticks):08x}"
    rejected = rejected or {}
    rows, rejects, digests = [], [], {}
    for source in shard.objects:
        stem = Path(source.uri).stem
        digests[source.uri] = hashlib.blake2b(Path(source.uri).read_bytes(), digest_size=16).hexdigest()
        if stem in rejected:
            rejects.append(Reject(stem, "decode", rejected[stem], "x", policy=True, uri=source.uri))
            continue
        name = row_id(source.uri, source.etag)
        text = (source.uri, stem, digests[source.uri])
        rows.append(IndexRow(name, len(rows), 0, 4, "", None, None, None, (1,), "float32", "v5", 5, *text, None))
    files = ()
    if rows:
        index = f"index/{attempt}.idx.parquet"
        write_index(spool / attempt, rows, {})
        store.upload(spool / attempt, index)
        files = (WrittenFile(f"data/{attempt}.parquet", index, "v5", 4, 4, len(rows), "", "", 5 * len(rows)),)
    made = Receipt(
        format_version=FORMAT_VERSION,
        shard_id=shard.id(FINGERPRINT),
        shard=shard,
        fingerprint=FINGERPRINT,
        fingerprint_parts={},
        attempt=attempt,
        created=attempt,
        files=files,
        counts=Counts(len(shard.objects), len(rows), len(rejects), len(rows), len(rows), 0, 5 * len(rows)),
        rejects=tuple(rejects),
        stats=STATS if rows else None,
        timings=Timings(),
        limits=job.limits(),
        digests=digests,
        recovered=len(rows) if shard.retry is not None else 0,
    )
    return Ledger(store).commit(made)


def _is_there(source: SourceObject) -> bool:
    path = Path(source.uri)
    return path.exists() and f"{path.stat().st_mtime_ns}-{path.stat().st_size}" == source.etag


class Run:
    """A build that can be stopped after any step."""

    def __init__(self, store: LocalStore, inputs: list[str], spool: Path, job: EncodeJob) -> None:
        self.store, self.spool, self.job = store, spool, job
        listed = resolve_inputs(inputs, job.storage)
        self.work = find_work(listed, Summaries(store).all(), FINGERPRINT, job)
        if self.work.touched and (same := find_unchanged(store, self.work.touched, job)):
            record_unchanged(store, same, SimpleNamespace(fingerprint=FINGERPRINT, fingerprint_parts={}, job=job))
            self.work = without_unchanged(self.work, same)
        retry_work(store, self.work, job)
        self.todo = self.work.todo(job.storage)
        self.committed: list[Receipt] = []

    def step(self, rejected: dict[str, str] | None = None) -> bool:
        """One shard; False if there was none left."""
        if not self.todo:
            return False
        shard = self.todo.pop(0)
        found = Ledger(self.store).read(shard.id(FINGERPRINT))
        if found is None and all(_is_there(source) for source in shard.objects):
            self.committed.append(commit(self.store, self.job, shard, self.spool, rejected))
        return True

    def finish(self, rejected: dict[str, str] | None = None) -> Run:
        while self.step(rejected):
            pass
        return self


def visible(store: LocalStore) -> list[IndexRow]:
    """Rows as readers see them."""
    found = []
    for part in counted_receipts(store):
        for item in () if part.superseded else part.receipt.files:
            found += shown(part, read_index(store.read(item.index_key))[0])
    return found


def totals(store: LocalStore) -> Counts:
    return sum((shares(store, part)[0] for part in counted_receipts(store)), Counts())


@pytest.fixture
def world(tmp_path):
    """A folder of six videos, an output, a spool folder, and a way to run over some of the files."""
    folder, spool = tmp_path / "in", tmp_path / "spool"
    folder.mkdir()
    spool.mkdir()
    for name in "abcdef":
        (folder / f"{name}.mp4").write_bytes(name.encode() * 10)
    store = LocalStore(str(tmp_path / "out"))

    def run(names: str = "abcdef", *overrides: str, **flags: object) -> Run:
        paths = [str(folder / f"{name}.mp4") for name in names]
        return Run(store, paths, spool, job_for(tmp_path / "out", *overrides, **flags))

    return SimpleNamespace(folder=folder, store=store, run=run, spool=spool)


def test_a_run_over_a_subset_between_two_full_runs_doubles_nothing(world):
    world.run("abc")  # planned and killed before its first receipt
    world.run("a").finish()
    world.run("abc").finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")
    assert world.run("abc").todo == []


def test_a_file_that_went_away_and_came_back_is_not_encoded_again(world):
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
def test_a_cut_off_receipt_is_no_receipt_and_the_next_run_heals_it(world, content):
    (shard,) = world.run("ab").todo
    key = f"receipts/{shard.id(FINGERPRINT)}.json"
    world.store.write(key, content)
    assert world.run("ab").finish().committed
    assert world.store.read(key) == content  # never replaced: two attempts that both replace it could undo each other
    assert world.run("ab").todo == []
    assert Counter(row.source_key for row in visible(world.store)) == Counter("ab")


def test_a_receipt_of_another_format_is_refused_not_redone(world):
    (shard,) = world.run("ab").todo
    world.store.write(f"receipts/{shard.id(FINGERPRINT)}.json", b'{"format_version": 7}')
    with pytest.raises(OutputError, match="format version 7"):
        world.run("ab")


def touch(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))


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


def test_settings_that_changed_are_said(world):
    world.run("ab").finish()
    assert any("stored as parquet" in text for text in world.run("ab", **{"write.format": "tar"}).work.notices)
    job = job_for(Path(world.store.root))
    work = find_work(resolve_inputs([str(world.folder)], job.storage), Summaries(world.store).all(), "e" * 32, job)
    assert any("encoded before with other settings" in text for text in work.notices)
    assert len(work.files) == 6


# --- rejects that a later run may lift --------------------------------------------------------------------------------

LOW = ("decode.max_frames=20",)


def test_a_raised_limit_is_said_and_retried_on_request(world):
    world.run("abcd", *LOW).finish({"b": "too_many_frames", "c": "too_short"})
    told = world.run("abcd")
    assert told.todo == []
    (notice,) = told.work.notices
    assert "1 inputs of finished shards were rejected by limits" in notice
    assert "too_many_frames 1" in notice
    retry = world.run("abcd", retry_rejects="")
    (shard,) = retry.todo
    assert [Path(uri).stem for uri, _ in shard.retry.samples] == ["b"]
    retry.finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abd")
    assert totals(world.store) == Counts(4, 3, 1, 3, 3, 0, 15)
    assert world.run("abcd").work.notices == []
    assert world.run("abcd", retry_rejects="").todo == []


def test_the_same_or_a_lower_limit_is_not_worth_a_word(world):
    world.run("ab", *LOW).finish({"b": "too_many_frames"})
    assert world.run("ab", *LOW).work.notices == []
    assert world.run("ab", "decode.max_frames=10").work.notices == []


def test_named_reasons_are_retried_whatever_the_limits(world):
    world.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    assert world.run("abc").work.notices == []
    first = world.run("abc", retry_rejects="decoder_crashed").finish({"b": "undecodable"})
    assert len(first.committed) == 1
    assert totals(world.store) == Counts(3, 1, 2, 1, 1, 0, 5)
    # The second retry of one sample knows of the first, and replaces its reject.
    assert world.run("abc", retry_rejects="decoder_crashed").todo == []
    world.run("abc", retry_rejects="undecodable,too_short").finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")
    assert totals(world.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_two_retries_at_once_count_once(world):
    world.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    one = world.run("abc", retry_rejects="decoder_crashed")
    other = world.run("abc", retry_rejects="decoder_crashed,too_short")
    one.finish()
    other.finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")


# --- summaries --------------------------------------------------------------------------------------------------------


class Counting(LocalStore):
    reads = 0

    def read(self, key: str) -> bytes:
        self.reads += key.startswith("receipts/")
        return super().read(key)


def test_a_cache_of_summaries_saves_reads_and_is_never_trusted_over_the_list(world, monkeypatch):
    monkeypatch.setattr("pipeline.summaries.WORTH_SAVING", 1)
    world.run("abcdef", "storage.files_per_shard=1").finish()
    store = Counting(world.store.root)
    summaries = Summaries(store)
    found = summaries.all()
    summaries.save()
    assert store.reads == 6
    assert Summaries(store).all() == found
    assert store.reads == 6
    gone = found[0]
    store.delete(gone.key)
    assert {item.key for item in Summaries(store).all()} == {item.key for item in found[1:]}
    store.write(
        gone.key, json.dumps({**json.loads(_receipt_like(store, found[1].key)), "shard_id": gone.shard_id}).encode()
    )
    assert gone not in Summaries(store).all()  # the same name with other contents is read
    (cached,) = [info.key for info in store.list(SUMMARIES)]
    store.write(cached, b"damaged")
    assert len(Summaries(store).all()) == 6


def _receipt_like(store: LocalStore, key: str) -> bytes:
    return LocalStore.read(store, key)


# --- any interleaving -------------------------------------------------------------------------------------------------

NAMES = "abcd"
starts = st.tuples(st.just("start"), st.sets(st.sampled_from(NAMES), min_size=2), st.integers(1, 3))
steps = st.tuples(st.just("step"), st.integers(0, 3))
actions = st.one_of(
    starts,
    *[steps] * 4,
    st.tuples(st.just("kill"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("restore"), st.sampled_from(NAMES)),
    st.tuples(st.just("touch"), st.sampled_from(NAMES)),
    st.tuples(st.just("cut"), st.integers(0, 3)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([LocalStore, NoConditions, Careless]),
    st.lists(starts, min_size=2, max_size=2),
    st.lists(actions, max_size=20),
)
def test_whatever_happened_one_clean_run_later_each_input_has_its_row_once(kind, first, script):
    root = Path(tempfile.mkdtemp())
    try:
        folder, away, spool = root / "in", root / "away", root / "spool"
        for path in (folder, away, spool):
            path.mkdir()
        for name in NAMES:
            (folder / f"{name}.mp4").write_bytes(name.encode() * 10)
        store = kind(str(root / "out"))
        _play([*first, *script], store, folder, away, spool)
        for path in away.iterdir():
            path.rename(folder / path.name)
        final = Run(store, [str(folder)], spool, job_for(root / "out"))
        final.finish()
        assert Counter(row.source_key for row in visible(store)) == Counter(NAMES)
        assert totals(store) == Counts(4, 4, 0, 4, 4, 0, 20)
        assert Run(store, [str(folder)], spool, job_for(root / "out")).todo == []
    finally:
        shutil.rmtree(root)


def _play(script, store, folder: Path, away: Path, spool: Path) -> None:
    runs: list[Run] = []
    for action, *values in script:
        if action == "start":
            names, per_shard = values
            paths = [str(folder / f"{name}.mp4") for name in sorted(names) if (folder / f"{name}.mp4").exists()]
            if paths:
                runs.append(Run(store, paths, spool, job_for(folder, f"storage.files_per_shard={per_shard}")))
        elif action in ("step", "kill", "cut") and runs:
            run = runs[values[0] % len(runs)]
            if action == "step":
                run.step()
            elif action == "kill":
                runs.remove(run)
            elif run.todo:  # its writer is killed while it writes the receipt, on a mount that shows half objects
                store.write(f"receipts/{run.todo[0].id(FINGERPRINT)}.json", b'{"half')
        elif action in ("remove", "restore", "touch"):
            here, there = folder / f"{values[0]}.mp4", away / f"{values[0]}.mp4"
            if action == "remove" and here.exists():
                here.rename(there)
            elif action == "restore" and there.exists():
                there.rename(here)
            elif action == "touch" and here.exists():
                touch(here)

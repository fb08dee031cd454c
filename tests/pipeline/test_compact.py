"""`lathe compact`: the same rows in fewer files, for every reader; refusals, races and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import WriteConfig
from pipeline.errors import InputError, LeaseHeld, OutputError, PublishFailed, StorageUnavailable
from pipeline.format.layout import DELTA_LOG
from pipeline.ledger.lease import MAINTENANCE, Lease
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate import compact as compacting
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.compact_files import CompactionWriter
from pipeline.operate.verify import verify_output
from pipeline.storage import Store
from tests.pipeline.compacted import add_tar, delete_unnamed, make_history, rows_of, tar
from tests.pipeline.latent_clips import bits_of, latent_values, local_store
from tests.pipeline.published import publish_all, shown_ids

ALL = {"moments": True, "store": ("first_frame", "i2v_cond")}
KINDS = [WriteConfig(), WriteConfig(format="tar"), WriteConfig(**ALL), WriteConfig(format="tar", **ALL)]
KINDS += [WriteConfig(dtype="int8", compression="zstd"), WriteConfig(format="tar", dtype="int8", store=("i2v_cond",))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with two snapshots, Parquet."""
    folder = tmp_path_factory.mktemp("history")
    make_history(folder)
    return folder / "out"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """A copy of it that a test may change."""
    shutil.copytree(made, tmp_path / "out")
    return local_store(tmp_path / "out")


def data_files(store: Store) -> list[str]:
    return sorted(key for key in store.keys("data/") if not key.startswith(DELTA_LOG))


# --- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.format}-{config.moments}-{config.dtype}")
def test_the_same_rows_lie_in_one_file_of_each_bucket(tmp_path: Path, config: WriteConfig) -> None:
    store = make_history(tmp_path, config)
    before = Snapshots(store).latest()
    expected = rows_of(store, before)
    found = compact(store)
    after = Snapshots(store).latest()
    assert found.snapshot == after
    assert (after.number, after.parent) == (3, 2)
    assert rows_of(store, after) == expected, "ids, tensors and every column"
    assert shown_ids(store, after) == sorted(expected)
    files = Snapshots(store).table(after, "files").to_pylist()
    assert sorted(file["bucket"] for file in files) == ["v17x48x64", "v17x64x48"]
    assert (found.files_before, found.files_after) == (8, 2)
    # A taken down sample and the replaced film, in two buckets; the replaced tar was in no file of the snapshot.
    assert found.rows_dropped == 4
    assert not any(file["hidden"] for file in files)
    assert verify_output(store, snapshot=3).problems == []
    assert verify_output(store).problems == []


def test_the_record_differs_from_its_parent_in_files_and_bytes_only(store: Store) -> None:
    before = Snapshots(store).latest()
    found = compact(store)
    after = found.snapshot
    same = ("shards", "samples", "encoded", "rejected", "damaged", "clips_rejected", "rows", "frames")
    assert {name: after.counts[name] for name in same} == {name: before.counts[name] for name in same}
    assert after.counts["files"] < before.counts["files"]
    (one,), (two,) = before.fingerprints.values(), after.fingerprints.values()
    assert (one.stats, one.rows, one.parts, one.constants) == (two.stats, two.rows, two.parts, two.constants)
    assert {**after.changes, "files_added": 0, "files_dropped": 0} == dict.fromkeys(after.changes, 0)
    assert (after.changes["files_added"], after.changes["files_dropped"]) == (found.files_after, found.files_before)
    assert after.lineage["compaction"] == {"files_before": 8, "files_after": 2, "rows_dropped": 4}
    assert after.lineage["listing"] == before.lineage["listing"]
    assert all(check.ok for check in after.checks)


def test_bytes_that_were_taken_down_are_in_no_file_of_the_new_snapshot(store: Store) -> None:
    taken = bits_of(latent_values(2), "float16").tobytes()
    kept = bits_of(latent_values(1), "float16").tobytes()

    def holding(data: bytes) -> list[str]:
        return [key for key in data_files(store) if data in store.read(key)]

    old = holding(taken)
    assert len(old) == 2, "both buckets have latents of these values"
    record_takedown(store, "asked to, after the last snapshot", sources=[tar("b")])
    expected = rows_of(store, Snapshots(store).latest())
    snapshot = compact(store).snapshot
    assert rows_of(store, snapshot) == expected, "the newer takedown is in this snapshot"
    assert holding(taken) == old, "until `lathe gc`"
    assert len(snapshot.takedowns) == 2
    named = Snapshots(store).table(snapshot, "files", ["key"])["key"].to_pylist()
    assert not set(old) & set(named)
    assert len(set(holding(kept)) & set(named)) == 2
    assert verify_output(store, snapshot=3).problems == []


def test_a_second_compaction_merges_compacted_files_with_new_ones(store: Store, tmp_path: Path) -> None:
    compact(store)
    add_tar(store, tmp_path, "c", [31, 32], "c1")
    add_tar(store, tmp_path, "a", [4], "a2")
    publish_all(store)
    expected = rows_of(store, Snapshots(store).latest())
    found = compact(store)
    assert (found.files_before, found.files_after) == (6, 2)
    assert found.rows_dropped == 4, "of the tar that was replaced, one sample of three was dropped before"
    assert rows_of(store, found.snapshot) == expected
    delete_unnamed(store)
    assert rows_of(store, found.snapshot) == expected
    assert verify_output(store).problems == []
    assert rows_of(store, publish_all(store)) == expected, "receipts of replaced inputs are retired"


def test_nothing_to_do_publishes_nothing(store: Store) -> None:
    compact(store)
    before = sorted(store.keys(""))
    again = compact(store)
    assert (again.snapshot, again.files_before) == (None, 0)
    assert "nothing to do" in again.notices[0]
    assert sorted(key for key in store.keys("") if "_leases" not in key) == [
        key for key in before if "_leases" not in key
    ]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(store: Store) -> None:
    before = {key: store.stat(key).etag for key in store.keys("") if not key.startswith("_summaries")}
    found = compact(store, CompactOptions(dry_run=True))
    assert (found.snapshot, found.files_before, found.files_after, found.rows_dropped) == (None, 8, 2, 4)
    after = {key: store.stat(key).etag for key in store.keys("") if not key.startswith("_summaries")}
    assert after == before


def test_only_takedowns_rewrites_only_files_with_rows_that_were_taken_down(store: Store) -> None:
    expected = rows_of(store, Snapshots(store).latest())
    found = compact(store, CompactOptions(only_takedowns=True))
    assert (found.files_before, found.files_after, found.rows_dropped) == (2, 2, 2)
    assert rows_of(store, found.snapshot) == expected
    assert compact(store, CompactOptions(only_takedowns=True)).snapshot is None


def test_the_target_bounds_what_is_merged(store: Store) -> None:
    expected = rows_of(store, Snapshots(store).latest())
    sizes = [row["bytes"] for row in Snapshots(store).table(Snapshots(store).latest(), "files").to_pylist()]
    found = compact(store, CompactOptions(target_bytes=2 * max(sizes) + 1))
    assert 2 < found.snapshot.counts["files"] < 8
    assert rows_of(store, found.snapshot) == expected


# --- refusals, damage and others at the same time ----------------------------------------------------------------------


def test_an_output_without_snapshots_is_refused(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    add_tar(store, tmp_path, "a", [1], "a1")
    with pytest.raises(InputError, match="has no snapshot; run `lathe publish"):
        compact(store)


@pytest.mark.parametrize("what", ["tensor", "index", "gone"])
def test_a_damaged_file_stops_the_compaction_by_its_name(store: Store, what: str) -> None:
    file = Snapshots(store).table(Snapshots(store).latest(), "files").to_pylist()[-1]
    key = file["index_key"] if what == "index" else file["key"]
    data = store.read(key)
    if what == "gone":
        store.delete(key)
    else:
        at = data.find(bits_of(latent_values(13), "float16").tobytes()[:64]) if what == "tensor" else len(data) // 2
        store.write(key, data[: max(at, 100)] + b"\x01\x02" + data[max(at, 100) + 2 :])
    before = data_files(store)
    with pytest.raises(OutputError, match=f"{key} is not as it was written"):
        compact(store)
    assert Snapshots(store).numbers() == [1, 2]
    assert data_files(store) == before, "nothing of the attempt stays"


def test_a_lost_receipt_stops_the_compaction(store: Store) -> None:
    store.delete(next(store.keys("_receipts/")))
    with pytest.raises(PublishFailed, match="1 receipt is gone or cut off although covered by snapshot 2"):
        compact(store)


def test_two_compactions_at_once_are_refused(store: Store) -> None:
    with Lease(store, MAINTENANCE, "lathe gc"), pytest.raises(LeaseHeld, match="lathe gc"):
        compact(store)
    assert compact(store).snapshot is not None


def test_what_happens_while_files_are_written_is_in_the_snapshot(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar is replaced and published, and a sample is taken down: hidden in the compacted file, although copied."""
    plain = CompactionWriter.write

    def write(self: CompactionWriter, *arguments: object) -> list:
        made = plain(self, *arguments)
        add_tar(store, tmp_path, "b", [14], "b3")
        publish_all(store)
        record_takedown(store, "asked to", samples=[(tar("a"), "dir/video00003")])
        return made

    monkeypatch.setattr(CompactionWriter, "write", write)
    snapshot = compact(store).snapshot
    assert (snapshot.number, snapshot.parent) == (4, 3)
    expected = rows_of(store, Snapshots(store).read(3))
    assert rows_of(store, snapshot) == expected
    assert "video00014-0000" in expected
    assert not {"video00013-0000", "video00003-0000"} & set(expected)
    hidden = [len(file["hidden"]) for file in Snapshots(store).table(snapshot, "files").to_pylist()]
    assert sorted(hidden) == [0, 0, 2, 2]
    assert verify_output(store, snapshot=4).problems == []
    assert verify_output(store).problems == []


def test_a_publisher_that_is_first_makes_the_compaction_the_next_snapshot(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, others = Snapshots.create, []

    def create(self: Snapshots, snapshot: object) -> None:
        if not others:
            others.append(None)
            add_tar(store, tmp_path, "c", [31], "c1")
            others[0] = publish_all(store)
        plain(self, snapshot)

    monkeypatch.setattr(Snapshots, "create", create)
    snapshot = compact(store).snapshot
    assert (snapshot.number, snapshot.parent) == (4, 3)
    assert rows_of(store, snapshot) == rows_of(store, others[0])


def test_files_of_a_compaction_that_fails_at_its_end_are_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = data_files(store)

    def refuse(*_: object) -> None:
        raise PublishFailed("no")

    monkeypatch.setattr(compacting, "rewritten", refuse)
    with pytest.raises(PublishFailed, match="no"):
        compact(store)
    assert data_files(store) == before


@pytest.mark.parametrize("error", [StorageUnavailable("the store does not answer"), KeyboardInterrupt()])
def test_files_of_a_snapshot_that_may_be_there_stay(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The store took the record and failed before it could be read back, or a signal came then."""
    expected, plain = rows_of(store, Snapshots(store).read(2)), type(store).put_if_absent

    def put(self: Store, key: str, data: bytes) -> bool:
        made = plain(self, key, data)
        if key.startswith("_snapshots/"):
            raise error
        return made

    monkeypatch.setattr(type(store), "put_if_absent", put)
    with pytest.raises(type(error)):
        compact(store)
    monkeypatch.undo()
    assert rows_of(store, Snapshots(store).read(3)) == expected
    assert verify_output(store, snapshot=3).problems == []


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_files_with_columns_of_another_version_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """A column that a later version does not know is never dropped."""
    from pipeline.operate import stored_rows

    store = make_history(tmp_path, WriteConfig(format=format))
    expected = rows_of(store, Snapshots(store).latest())
    monkeypatch.setattr(stored_rows, "IN_JSON", stored_rows.IN_JSON | {"new"})
    monkeypatch.setattr(stored_rows, "parquet_schema", lambda **stored: pa.schema({"new": pa.int64()}))
    found = compact(store)
    assert (found.snapshot, found.files_before) == (None, 0)
    assert len(found.notices) == 8
    assert "another version of Lathe wrote it" in found.notices[0]
    assert rows_of(store, Snapshots(store).latest()) == expected

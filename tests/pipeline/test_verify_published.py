"""`verify_output` finds what snapshots need and no receipt leads to: lost receipts, files of older snapshots, compacted files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.format.layout import CURRENT, retired_key, snapshot_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.verify import verify_output
from pipeline.operate.verify_published import LISTED_RECEIPTS
from pipeline.storage import Store
from tests.pipeline.compacted import add_tar, make_history
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots with replaced inputs, and a third that is a compaction."""
    folder = tmp_path_factory.mktemp("verified")
    compact(make_history(folder), CompactOptions(delta=False))
    return folder / "out"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "out")
    return local_store(tmp_path / "out")


def problems(store: Store, **options: bool) -> list[tuple[str, str, str]]:
    return [(item.file, item.found, item.expected) for item in verify_output(store, **options).problems]


def flip(store: Store, key: str) -> None:
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))


def files_of(store: Store, number: int) -> dict[str, dict[str, object]]:
    """Rows of the table `files` by key."""
    snapshots = Snapshots(store)
    return {row["key"]: row for row in snapshots.table(snapshots.read(number), "files").to_pylist()}


@pytest.mark.parametrize("deep", [True, False])
def test_a_receipt_that_the_newest_snapshot_covers_and_that_is_gone_is_a_problem(tmp_path: Path, *, deep: bool) -> None:
    store = local_store(tmp_path / "out")
    lost, *_, empty = add_shards(store, tmp_path, range(4))
    publish_all(store, delta=False)
    add_shards(store, tmp_path, range(4, 5))
    assert problems(store, deep=deep) == []
    key = CURRENT.receipt_key(lost.shard_id)
    store.delete(key)
    expected = "one that snapshot 1 covers; restore it, or see what `lathe publish` says"
    assert problems(store, deep=deep) == [(key, "no such receipt", expected)]
    store.write(CURRENT.receipt_key(empty.shard_id), b"")
    assert len(problems(store)) == 2, "one that is cut off is reported once"
    store.write(retired_key(lost.shard_id, "a1"), lost.to_json())
    assert {what for _, what, _ in problems(store)} == {
        "only a retired receipt",
        "an empty or cut-off receipt: its shard counts as not done",
    }


def test_many_lost_receipts_are_listed_in_part(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    number = LISTED_RECEIPTS + 3
    receipts = add_shards(store, tmp_path, range(number))
    publish_all(store, delta=False)
    for receipt in receipts:
        store.delete(CURRENT.receipt_key(receipt.shard_id))
    found = verify_output(store)
    assert len(found.problems) == LISTED_RECEIPTS + 1
    assert found.problems[-1].found == "3 more receipts are gone"
    assert (found.files, found.bytes_read > 0) == (number, True), "their files are checked all the same"


def test_a_receipt_that_gc_retired_is_no_loss(store: Store) -> None:
    """The newest snapshot covers it, with no row."""
    snapshots = Snapshots(store)
    table = snapshots.table(snapshots.latest(), "receipts", ["shard_id", "clips"]).to_pylist()
    (shard,) = [row["shard_id"] for row in table if not row["clips"]]
    receipt = Ledger(store).read(shard)
    store.write(retired_key(shard, receipt.attempt), receipt.to_json())
    store.delete(CURRENT.receipt_key(shard))
    assert problems(store) == []
    store.delete(retired_key(shard, receipt.attempt))
    assert [item[1] for item in problems(store)] == ["no such receipt"]


def test_files_that_only_an_older_snapshot_needs_are_checked(store: Store) -> None:
    report = verify_output(store)
    assert report.ok, report.problems
    older = files_of(store, 1).keys() - files_of(store, 3).keys()
    every = {key: row for number in (1, 2, 3) for key, row in files_of(store, number).items()}
    assert report.bytes_read >= sum(row["bytes"] + row["index_bytes"] for row in every.values())
    assert any("data files" in text and "older snapshots" in text for text in report.notices)
    lost, flipped, unindexed = sorted(older & set(published_copies(store).table["origin"].to_pylist()))[:3]
    store.delete(lost)
    flip(store, flipped)
    store.delete(every[unindexed]["index_key"])
    found = {name: (what, expected) for name, what, expected in problems(store)}
    size = every[lost]["bytes"]
    assert found[lost] == (
        "no such file",
        f"{size} bytes, for snapshot {max(n for n in (1, 2) if lost in files_of(store, n))}",
    )
    assert found[flipped][0].startswith("sha256")
    assert found[every[unindexed]["index_key"]][0] == "no such file"
    for number in (1, 2):
        store.delete(snapshot_key(number))
    assert problems(store) == [], "no snapshot names them now"
    assert any("no snapshot names" in text for text in verify_output(store).notices)


def test_files_of_a_retired_receipt_that_an_older_snapshot_names_are_checked(tmp_path: Path) -> None:
    """No compaction: another version of the input counts, and `lathe gc` moved the receipt."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    old = add_tar(store, tmp_path, "a", [1], "a1")
    publish_all(store, delta=False)
    add_tar(store, tmp_path, "a", [2], "a2")
    publish_all(store, delta=False)
    store.write(retired_key(old.shard_id, old.attempt), old.to_json())
    store.delete(CURRENT.receipt_key(old.shard_id))
    report = verify_output(store)
    assert (report.problems, report.orphans) == ([], 0), "no orphans: snapshot 1 names them"
    flip(store, old.files[0].key)
    assert {item[0].partition("#")[0] for item in problems(store)} == {old.files[0].key}


def test_compacted_files_that_the_newest_snapshot_leaves_out_are_checked(tmp_path: Path) -> None:
    """A publish of one fingerprint. The next publish of all takes the files of the others in again."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    for name in "ab":
        add_tar(store, tmp_path, name, [ord(name)], "e1")
    publish_all(store, delta=False)
    compact(store, CompactOptions(delta=False))
    for number in (1, 2):
        assert files_of(store, number)
    add_shards(store, tmp_path, range(5, 6), fingerprint="ab" * 16)
    before = {name for name, _, _ in problems(store)}  # files of that shard say another fingerprint
    compacted = sorted(files_of(store, 2))
    publish_all(store, delta=False, fingerprint="abab")
    for number in (1, 2):
        store.delete(snapshot_key(number))
    flip(store, compacted[0])
    found = {name.partition("#")[0] for name, _, _ in problems(store)}
    assert found - before == {compacted[0]}

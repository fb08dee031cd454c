"""Outputs that go on after a compaction: the next snapshots show the same rows, counts and statistics as those of an output without one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PublishFailed
from pipeline.format.layout import snapshot_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.gc import collect
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.takedown import undo
from pipeline.operate.verify import verify_output
from pipeline.storage import Store
from tests.operate.outputs import NEWEST, aged, write_version
from tests.pipeline.compacted import add_films, add_tar, delete_unnamed, listing, make_history, rows_of, tar
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import publish_all
from tests.pipeline.random_history import RandomHistory

FILES_ONLY = CompactOptions(delta=False)
Step = Callable[[Store, Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    make_history(folder)
    return folder / "out"


def copied(made: Path, folder: Path, name: str) -> Store:
    shutil.copytree(made, folder / name)
    return local_store(folder / name)


def replace_a_film(store: Store, folder: Path) -> None:
    add_films(store, folder, {"f": (25, "f2")})


def replace_a_tar(store: Store, folder: Path) -> None:
    add_tar(store, folder, "b", [15, 16], "b3")


def take_a_sample_down(store: Store, folder: Path) -> None:
    record_takedown(store, "asked to", samples=[(tar("a"), "dir/video00003")])


def take_a_row_down(store: Store, folder: Path) -> None:
    record_takedown(store, "asked to", ids=["video00021-0001"])


def take_a_tar_down(store: Store, folder: Path) -> None:
    record_takedown(store, "asked to", sources=[tar("a")])


def add_another(store: Store, folder: Path) -> None:
    add_tar(store, folder, "c", [31], "c1")


NOW = {"a": "a1", "b": "b2", "f": "f1", "g": "g2", "h": "h1"}
GONE = {name: etag for name, etag in NOW.items() if name not in "fb"}
STEPS: dict[str, list[tuple[Step | None, dict[str, object]]]] = {
    "replaced film": [(replace_a_film, {})],
    "replaced tar": [(replace_a_tar, {})],
    "takedowns": [(take_a_sample_down, {}), (take_a_row_down, {}), (take_a_tar_down, {})],
    "added": [(add_another, {}), (replace_a_film, {})],
    "a film goes back to its older version": [
        (replace_a_film, {}),
        (None, {"listing": listing(**NOW)}),
        (None, {"listing": listing(**{**NOW, "f": "f2"})}),
    ],
    "inputs dropped and listed again": [
        (None, {"listing": listing(**GONE), "removed": "drop"}),
        (None, {"listing": listing(**NOW), "removed": "drop"}),
    ],
}


@pytest.mark.parametrize(
    ("name", "collected"),
    [*((name, True) for name in STEPS), ("takedowns", False), ("a film goes back to its older version", False)],
)
def test_snapshots_after_a_compaction_are_those_of_an_output_without_one(
    made: Path, tmp_path: Path, name: str, collected: bool
) -> None:
    plain, compacted = copied(made, tmp_path, "plain"), copied(made, tmp_path, "compacted")
    compact(compacted, FILES_ONLY)
    if collected:
        assert len(delete_unnamed(compacted)) > 6
    for number, (step, options) in enumerate(STEPS[name]):
        for store in (plain, compacted):
            if step is not None:
                step(store, tmp_path / f"{number}")
        one, two = (publish_all(store, delta=False, **options) for store in (plain, compacted))
        check_equal(plain, one, compacted, two)
    assert verify_output(compacted, snapshot=two.number).problems == []
    assert verify_output(compacted).problems == []
    assert publish(compacted, PublishOptions(delta=False)).made is False


def check_equal(plain: Store, one: Snapshot, compacted: Store, two: Snapshot) -> None:
    assert rows_of(compacted, two) == rows_of(plain, one)
    counted = ("rows", "frames", "samples", "encoded", "rejected")
    assert [two.counts[name] for name in counted] == [one.counts[name] for name in counted]
    files = ("files_added", "files_dropped")
    assert {**two.changes, **dict.fromkeys(files)} == {**one.changes, **dict.fromkeys(files)}
    for fingerprint, part in one.fingerprints.items():
        mine = two.fingerprints[fingerprint]
        assert (mine.rows, mine.stats.n) == (part.rows, part.stats.n)
        for name in ("mean", "m2", "min", "max"):
            assert getattr(mine.stats, name) == pytest.approx(getattr(part.stats, name), rel=1e-9)


def test_a_replaced_film_that_was_dropped_counts_again_from_its_old_file(made: Path, tmp_path: Path) -> None:
    """Its rows are in no compacted file. Once the old file is deleted, publishing says which receipt to delete."""
    store = copied(made, tmp_path, "out")
    older = {**NOW, "g": "g1"}
    compact(store, FILES_ONLY)
    twin = copied(tmp_path / "out", tmp_path, "twin")
    back = publish_all(store, delta=False, listing=listing(**older))
    assert {"video00022-0000", "video00022-0001"} <= set(rows_of(store, back))
    assert "video00024-0000" not in rows_of(store, back)
    assert verify_output(store, snapshot=back.number).problems == []
    assert [check.numbers["read"] for check in back.checks if check.name == "files"] == [0], "it was published before"
    delete_unnamed(twin)
    with pytest.raises(
        PublishFailed, match=r"1 rows of shard \w+ count again that `lathe compact` dropped, and data/.* is deleted"
    ):
        publish_all(twin, delta=False, listing=listing(**older))


@pytest.mark.parametrize("lost", ["record", "table"])
def test_a_rebuild_without_any_whole_snapshot_finds_rows_in_compacted_files(
    made: Path, tmp_path: Path, lost: str
) -> None:
    store = copied(made, tmp_path, "out")
    compact(store, FILES_ONLY)
    add_another(store, tmp_path)
    publish_all(store, delta=False)
    compact(store, FILES_ONLY)
    expected = rows_of(store, Snapshots(store).latest())
    delete_unnamed(store)
    (number,) = Snapshots(store).numbers()
    key = snapshot_key(number) if lost == "record" else Snapshots(store).read(number).tables["files"].key
    store.write(key, b"{}")
    rebuilt = publish(store, PublishOptions(rebuild=True, delta=False)).snapshot
    assert rows_of(store, rebuilt) == expected
    assert verify_output(store, snapshot=rebuilt.number).problems == []
    replace_a_film(store, tmp_path)
    assert "video00021-0000" not in rows_of(store, publish_all(store, delta=False))


def test_a_rebuild_from_an_older_snapshot_takes_the_files_that_receipts_name(made: Path, tmp_path: Path) -> None:
    store = copied(made, tmp_path, "out")
    expected = rows_of(store, Snapshots(store).latest())
    compact(store, FILES_ONLY)
    store.write(snapshot_key(3), b"{}")
    rebuilt = publish(store, PublishOptions(rebuild=True, delta=False)).snapshot
    assert (rebuilt.number, rebuilt.parent) == (4, 2)
    assert rows_of(store, rebuilt) == expected
    assert compact(store, FILES_ONLY).snapshot.number == 5
    assert rows_of(store, Snapshots(store).latest()) == expected


def test_fingerprints_that_a_snapshot_leaves_out_come_back_from_their_compacted_files(tmp_path: Path) -> None:
    store, other = local_store(tmp_path / "out"), "ab" * 16
    Ledger(store).prepare("films")
    for number, name in enumerate("abc"):
        add_tar(store, tmp_path, name, [number], "e1")
        add_tar(store, tmp_path, name, [10 + number], "e1", fingerprint=other)
    expected = rows_of(store, publish_all(store, delta=False))
    found = compact(store, FILES_ONLY)
    assert (found.files_before, found.files_after) == (12, 4), "one of each fingerprint and bucket"
    delete_unnamed(store)
    alone = publish_all(store, delta=False, fingerprint="abab")
    assert sorted(rows_of(store, alone)) == [f"video{10 + n:05d}-{clip:04d}" for n in range(3) for clip in range(2)]
    assert rows_of(store, publish_all(store, delta=False)) == expected


# --- rows that were dropped and count again ---------------------------------------------------------------------------


@pytest.mark.parametrize("target_bytes", [512 * 1024 * 1024, 1000], ids=["merged", "a file of its own"])
@pytest.mark.parametrize("collected", [True, False])
def test_an_origin_may_have_several_copies(tmp_path: Path, target_bytes: int, collected: bool) -> None:
    """A takedown is undone after a compaction: its row counts from the old file, and the next compaction copies it."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    write_version(store, tmp_path, "a", "e1", (1, 2, 3))
    write_version(store, tmp_path, "b", "e1", (11, 12))
    publish_all(store, delta=False)
    full = rows_of(store, Snapshots(store).latest())
    record = record_takedown(store, "asked", samples=[(tar("a"), "a/2")])
    publish_all(store, delta=False)
    compact(store, FILES_ONLY)
    undo(store, record.key, reason="", by="")
    publish_all(store, delta=False)
    compact(store, CompactOptions(delta=False, target_bytes=target_bytes))
    copies = Snapshots(store).table(Snapshots(store).latest(), "copies").to_pylist()
    assert sorted((row["rows"], row["dropped"]) for row in copies) == [(1, []), (2, []), (2, [])]
    if collected:
        aged(store)
        assert collect(store, NEWEST)["deleted"]["compacted"]["files"] >= 2
        store.write(snapshot_key(Snapshots(store).latest().number), b"{}")
        publish(store, PublishOptions(rebuild=True, delta=False))
    assert rows_of(store, Snapshots(store).latest()) == full
    for taken in (3, 2, 1):
        record_takedown(store, "asked", samples=[(tar("a"), f"a/{taken}")])
        del full[f"video{taken:05d}-0000"]
        assert rows_of(store, publish_all(store, delta=False)) == full
        assert verify_output(store).problems == []
    again = compact(store, FILES_ONLY).snapshot
    assert rows_of(store, again) == full
    copies = Snapshots(store).table(again, "copies").to_pylist()
    dropped = sorted(item["id"] for row in copies for item in row["dropped"])
    assert dropped == [f"video{number:05d}-0000" for number in (1, 2, 3)], "each in one copy"


# --- random histories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 9, 12])
def test_a_random_history_shows_what_its_inputs_and_takedowns_say(tmp_path: Path, seed: int) -> None:
    """Inputs are replaced, go back, are dropped and return, between takedowns, undos, compactions and gcs."""
    history = RandomHistory(tmp_path, seed)
    for _ in range(16):
        history.step()
    history.publish()

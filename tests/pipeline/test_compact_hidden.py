"""Stored files none of whose rows count: `lathe compact` records their rows as dropped, `lathe gc` deletes them."""

from __future__ import annotations

from pathlib import Path

import deltalake
import pytest

from pipeline.errors import PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate import compact as compaction
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.gc import collect
from pipeline.operate.verify import verify_output
from pipeline.records import Receipt, Shard, SourceObject
from pipeline.storage import Store
from tests.operate.outputs import NEWEST, aged, stored, write_files, write_version
from tests.pipeline.compacted import WIDE, add_tar, film
from tests.pipeline.latent_clips import latent_clip, local_store
from tests.pipeline.published import publish_all, shown_ids


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def newest_ids(store: Store) -> list[str]:
    return shown_ids(store, Snapshots(store).latest())


def write_films(store: Store, folder: Path, films: dict[str, tuple[int, str]], attempt: str) -> Receipt:
    """Commits plain films: name -> (seed, etag). `h` is in another bucket, so in another file."""
    shard = Shard("files", "films", tuple(SourceObject(film(name), 10, etag) for name, (_, etag) in films.items()))
    wide = {"h": {"bucket": WIDE}}
    clips = [latent_clip(seed, uri=film(name), key=name, **wide.get(name, {})) for name, (seed, _) in films.items()]
    return Ledger(store).commit(write_files(store, folder / "spool", shard, clips, attempt))


def hide_a_file_of_films(store: Store, folder: Path) -> tuple[str, str]:
    """One film of a file is taken down, the other is replaced; the third, in another file, counts. Returns that file and its index."""
    old = write_films(store, folder, {"f": (1, "1"), "g": (2, "1"), "h": (3, "1")}, "a1")
    publish_all(store)
    write_films(store, folder, {"g": (9, "2")}, "a2")
    record_takedown(store, "asked", sources=[film("f")])
    publish_all(store)
    (mine,) = (item for item in old.files if item.rows == 2)
    assert newest_ids(store) == ["video00003-0000", "video00009-0000"]
    return mine.key, mine.index_key


def hide_a_compacted_file(store: Store, folder: Path) -> tuple[str, str]:
    """One tar of a compacted file is replaced, the other is taken down. Returns the file and its index."""
    write_version(store, folder, "a", "e1", (1,))
    write_version(store, folder, "b", "e1", (2,))
    publish_all(store)
    compact(store)
    (mine,) = Snapshots(store).table(Snapshots(store).latest(), "files").to_pylist()
    write_version(store, folder, "a", "e2", (3,), attempt="a2")
    record_takedown(store, "asked", sources=["s3://corpus/b.tar"])
    publish_all(store)
    assert newest_ids(store) == ["video00003-0000"]
    return mine["key"], mine["index_key"]


HIDE = {"of a receipt": hide_a_file_of_films, "compacted": hide_a_compacted_file}


@pytest.mark.parametrize("only_takedowns", [False, True], ids=["all", "only takedowns"])
@pytest.mark.parametrize("kind", HIDE)
def test_bytes_of_a_file_none_of_whose_rows_count_go(
    store: Store, tmp_path: Path, kind: str, only_takedowns: bool
) -> None:
    file = HIDE[kind](store, tmp_path)
    before, parent = newest_ids(store), Snapshots(store).latest()
    options = CompactOptions(only_takedowns=only_takedowns)
    planned = compact(store, CompactOptions(only_takedowns=only_takedowns, dry_run=True))
    made = compact(store, options)
    counts = (1, 0, 0, 2)
    assert (planned.files_before, planned.files_after, planned.bytes_written, planned.rows_dropped) == counts
    assert (made.files_before, made.files_after, made.bytes_written, made.rows_dropped) == counts
    assert (made.snapshot.parent, made.snapshot.counts) == (parent.number, parent.counts)
    assert made.snapshot.changes["files_dropped"] == 0
    assert newest_ids(store) == before
    table = deltalake.DeltaTable(store.uri("data")).to_pyarrow_table()
    assert sorted(table["id"].to_pylist()) == before
    assert compact(store, options).snapshot is None
    aged(store)
    collect(store, NEWEST)
    assert not set(file) & stored(store)
    assert newest_ids(store) == before
    assert verify_output(store).problems == []
    write_version(store, tmp_path, "z", "e1", (7,))
    record_takedown(store, "asked", samples=[("s3://corpus/z.tar", "z/7")])
    publish_all(store)
    assert newest_ids(store) == before
    compact(store)
    assert newest_ids(store) == before
    assert verify_output(store).problems == []


def test_only_takedowns_leaves_a_hidden_file_without_a_taken_down_row(store: Store, tmp_path: Path) -> None:
    old = write_films(store, tmp_path, {"g": (2, "1"), "h": (3, "1")}, "a1")
    publish_all(store)
    write_films(store, tmp_path, {"g": (9, "2")}, "a2")
    publish_all(store)
    assert compact(store, CompactOptions(only_takedowns=True)).snapshot is None
    made = compact(store, CompactOptions(target_bytes=1000))
    assert (made.files_before, made.files_after, made.rows_dropped) == (1, 0, 1)
    # Until gc deletes the file, the film may go back to that version.
    back = [SourceObject(film("g"), 10, "1"), SourceObject(film("h"), 10, "1")]
    publish_all(store, listing=back)
    assert newest_ids(store) == ["video00002-0000", "video00003-0000"]
    write_version(store, tmp_path, "a", "e1", (4,))
    publish_all(store)
    assert compact(store).files_before == 2, "it is merged with a file of its bucket"
    aged(store)
    collect(store, NEWEST)
    assert newest_ids(store) == ["video00002-0000", "video00003-0000", "video00004-0000"]
    assert not {item.key for item in old.files if item.bucket != WIDE.name} & stored(store)
    assert verify_output(store).problems == []


def test_compacted_files_of_a_fingerprint_that_the_snapshot_leaves_out_are_not_dropped(
    store: Store, tmp_path: Path
) -> None:
    write_version(store, tmp_path, "a", "e1", (1,))
    write_version(store, tmp_path, "b", "e1", (2,))
    publish_all(store)
    compact(store)
    expected = newest_ids(store)
    add_tar(store, tmp_path, "c", [6], "1", fingerprint="ab" * 16)
    publish_all(store, fingerprint="abab")
    compact(store)
    publish_all(store)
    assert set(expected) < set(newest_ids(store))


def test_a_hidden_file_that_a_publisher_shows_again_meanwhile_ends_the_compaction(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_a_file_of_films(store, tmp_path)
    back = [SourceObject(film(name), 10, "1") for name in "gh"]
    find = compaction.hidden_files

    def found(*args: object, **options: object) -> list:
        parts = find(*args, **options)
        publish_all(store, listing=back)
        return parts

    monkeypatch.setattr(compaction, "hidden_files", found)
    with pytest.raises(PublishFailed, match=r"1 rows of data/.* count again since they were left out"):
        compact(store)
    assert "video00002-0000" in newest_ids(store)

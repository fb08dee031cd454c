"""Takedowns and publishing: names that are not UTF-8, files that are deleted after they were taken down, records of wrong types."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cli.snapshot_wording import diff_lines
from pipeline.errors import InputError, OutputError, PublishFailed
from pipeline.format.columns import storable
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.operate.diff import diff
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.statistics import statistics
from pipeline.operate.verify import verify_output
from pipeline.records import Receipt
from pipeline.storage import Store
from tests.pipeline.frameless_build import visible
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all, shown_ids


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def shown_by_view(store: Store) -> set[str]:
    """Keys of the data files that the newest version of the Delta log names."""
    live: set[str] = set()
    for key in sorted(info.key for info in store.list("data/_delta_log/") if info.key.endswith(".json")):
        for line in store.read(key).splitlines():
            action = json.loads(line)
            if "add" in action:
                live.add("data/" + action["add"]["path"])
            elif "remove" in action:
                live.discard("data/" + action["remove"]["path"])
    return live


def delete_files(store: Store, receipt: Receipt) -> None:
    for item in receipt.files:
        store.delete(item.key)
        store.delete(item.index_key)


def test_a_row_of_a_name_that_is_not_utf_8_leaves_snapshot_and_view(workspace: SimpleNamespace) -> None:
    store = workspace.store
    Ledger(store).prepare("films")
    os.rename(workspace.folder / "b.mp4", os.fsencode(workspace.folder) + b"/b\xff.mp4")
    workspace.run(["a", "b\udcff", "c"], "storage.files_per_shard=1").finish()
    publish_all(store)
    (odd,) = [row for row in visible(store) if "\\udcff" in row.source_uri]
    record_takedown(store, "asked", ids=[odd.id])
    workspace.run("d").finish()
    second = publish_all(store)
    assert second.counts["rows"] == 3
    assert odd.id not in shown_ids(store, second)
    (receipt,) = [each for each in Ledger(store).all() if any("\udcff" in item.uri for item in each.shard.objects)]
    assert not {item.key for item in receipt.files} & shown_by_view(store)
    assert len(shown_by_view(store)) == 3


def test_a_uri_has_one_id_however_it_is_spelled() -> None:
    assert uri_id("/in/b\udcff.mp4") == uri_id(storable("/in/b\udcff.mp4")) != uri_id("/in/b.mp4")


def test_files_that_were_taken_down_may_be_deleted(store: Store, tmp_path: Path) -> None:
    """Before and after the next publish; later takedowns reach the view all the same."""
    receipts = add_shards(store, tmp_path, range(4))
    ids = shown_ids(store, publish_all(store))
    record_takedown(store, "asked", sources=[receipts[1].shard.objects[0].uri])
    delete_files(store, receipts[1])
    second = publish_all(store)
    assert (second.counts["rows"], second.counts["samples"], second.counts["encoded"]) == (6, 8, 8)
    check_readers_accept_deleted_files(store, receipts[2])
    taken = visible_id(store, receipts[3])
    record_takedown(store, "asked", ids=[taken])
    third = publish_all(store)
    assert third.counts["rows"] == 5
    assert set(shown_ids(store, third)) < set(ids) - {taken}
    assert receipts[1].files[0].key not in shown_by_view(store)
    assert len(shown_by_view(store)) == 2
    with pytest.raises(
        InputError, match=r"1 of 1 ids are not in .*; 1 indexes or snapshots cannot be read, such as _index/"
    ):
        record_takedown(store, "asked", ids=["video00100-5"])
    assert statistics(store, 1)["newer_takedowns"] == 2
    record_takedown(store, "asked", sources=["s3://elsewhere/x.tar"])
    store.delete(third.takedowns[0])
    assert statistics(store, 3)["newer_takedowns"] == 1, "one is new and one is gone"


def check_readers_accept_deleted_files(store: Store, other: Receipt) -> None:
    """`verify` and `diff`, of receipts that were taken down; a file of another receipt is a problem as before."""
    for number in (None, 1):
        report = verify_output(store, snapshot=number)
        assert (report.problems, report.rows) == ([], 6)
        assert "2 files are deleted of receipts whose sources are all taken down" in report.notices
    found = diff((store, 1), (store, 2))
    assert (found["rows"], len(found["files"]["dropped"])) == ({"added": 0, "dropped": 0}, 1)
    assert "rows that were taken down are left out of what follows" in diff_lines(found)[1]
    index = other.files[0].index_key
    data = store.read(index)
    store.delete(index)
    assert [item.file for item in verify_output(store, snapshot=1).problems] == [index]
    store.write(index, data)


def test_without_the_view_a_takedown_is_noted_and_read_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, words = PublishOptions(delta=False), "the Delta view may still show rows that were taken down"
    receipts = add_shards(store, tmp_path, range(2))
    publish(store, PublishOptions())
    made = record_takedown(store, "asked", sources=[receipts[1].shard.objects[0].uri])
    assert any(words in notice for notice in publish(store, plain).notices)
    read, keep = [], store.read
    monkeypatch.setattr(store, "read", lambda key: (read.append(key), keep(key))[1])
    publish(store, PublishOptions())
    assert read.count(made.key) == 1
    assert not any(words in notice for notice in publish(store, plain).notices)


def test_a_damaged_index_hides_neither_failed_checks_nor_other_takedowns(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(3))
    publish_all(store)
    index = receipts[0].files[0].index_key
    store.write(index, bytes(len(store.read(index))))
    record_takedown(store, "asked", ids=[visible_id(store, receipts[1])])
    (other,) = add_shards(store, tmp_path, range(3, 4))
    store.delete(other.files[0].key)
    with pytest.raises(PublishFailed, match="1 file is missing"):
        publish(store, PublishOptions())
    assert shown_by_view(store) == {receipts[2].files[0].key}
    with pytest.raises(OutputError, match="cannot be read as a side index"):
        statistics(store, 1)


def visible_id(store: Store, receipt: Receipt) -> str:
    from pipeline.ledger.receipts import stored_index

    return stored_index(store, receipt.files[0].index_key)[0].id


def test_a_latent_that_is_not_the_one_that_was_written_is_not_in_statistics(store: Store, tmp_path: Path) -> None:
    from pipeline.ledger.receipts import stored_index

    (receipt,) = add_shards(store, tmp_path, range(1))
    row = stored_index(store, receipt.files[0].index_key)[0]
    data = store.read(receipt.files[0].key)
    end = row.latent_offset + row.latent_length
    store.write(receipt.files[0].key, data[: row.latent_offset] + b"\xff" * row.latent_length + data[end:])
    publish_all(store)
    with pytest.raises(InputError, match="its index says"):
        statistics(store)


EMPTY = {"sources": [], "samples": [], "rows": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": [5]}, "sources have to be strings"),
        ({"sources": [None]}, "sources have to be strings"),
        ({"created": 5}, "created, reason and sources"),
        ({"samples": ["ab"]}, "samples have to be pairs of strings"),
        ({"samples": [[1, 2]]}, "samples have to be pairs of strings"),
        ({"samples": [["a"]]}, "samples have to be pairs of strings"),
        ({"rows": [{"id": 5, "source_uri": None}]}, "rows have to be objects with the strings id and source_uri"),
        ({"rows": [{"id": "a"}]}, "rows have to be objects"),
        ({"rows": ["a"]}, "rows have to be objects"),
        ({"rows": None}, "expected a JSON object with the lists"),
    ],
)
def test_a_takedown_of_wrong_types_stops_readers(store: Store, change: dict, words: str) -> None:
    record = {"format_version": 1, "created": "2026", "reason": "asked", **EMPTY, **change}
    store.write("_takedowns/x.json", json.dumps(record).encode())
    with pytest.raises(
        OutputError, match=f"_takedowns/x.json cannot be read as a takedown: .*{words}.*Restore or remove"
    ):
        read_takedowns(store)

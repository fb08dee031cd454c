"""Publishing after receipts were lost, after builds that end meanwhile, and after inputs that were left open."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cli.snapshot_wording import snapshots_lines
from pipeline.errors import PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.status import status
from pipeline.records import Receipt
from pipeline.storage import Store
from tests.pipeline.frameless_build import visible
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, listed, publish_all, shown_ids

PLAIN = PublishOptions(delta=False)
REBUILD = PublishOptions(delta=False, rebuild=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


@pytest.fixture
def films(workspace: SimpleNamespace) -> SimpleNamespace:
    Ledger(workspace.store).prepare("films")
    return workspace


def lose(store: Store, *receipts: Receipt) -> None:
    for receipt in receipts:
        store.delete(Ledger(store).layout.receipt_key(receipt.shard_id))


# --- lost receipts -----------------------------------------------------------------------------------------------------


def test_receipts_that_are_lost_for_good_are_left_out_on_request(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(3))
    publish(store, PLAIN)
    lose(store, receipts[1])
    with pytest.raises(
        PublishFailed,
        match=f"1 receipt is gone .* shard {receipts[1].shard_id}; 2 of their rows are known to count nowhere else.*--rebuild",
    ):
        publish(store, PLAIN)
    made = publish(store, REBUILD)
    assert made.snapshot.lineage["lost_receipts"] == {
        "count": 1,
        "costly": 1,
        "rows": 2,
        "shards": [receipts[1].shard_id],
    }
    assert any("1 receipt is gone that snapshot 1 covers, and left out: 2 rows" in notice for notice in made.notices)
    assert shown_ids(store, made.snapshot) == sorted(row.id for row in visible(store))
    assert publish(store, PLAIN).made is False


def test_a_lost_receipt_whose_rows_are_taken_down_is_left_out(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(2))
    ids = set(shown_ids(store, publish(store, PLAIN).snapshot))
    lose(store, receipts[1])
    (rest,) = {frozenset(ids - {row.id for row in visible(store)})}
    store.write(Ledger(store).layout.receipt_key(receipts[1].shard_id), receipts[1].to_json())
    first, second = sorted(rest)
    record_takedown(store, "asked", ids=[first])
    lose(store, receipts[1])
    with pytest.raises(PublishFailed, match="1 of their rows are known to count nowhere else"):
        publish(store, PLAIN)
    store.write(Ledger(store).layout.receipt_key(receipts[1].shard_id), receipts[1].to_json())
    record_takedown(store, "asked", ids=[second])
    lose(store, receipts[1])
    made = publish(store, PLAIN)
    assert (made.made, made.snapshot.counts["rows"], made.snapshot.lineage["lost_receipts"]["costly"]) == (True, 2, 0)


def test_a_lost_receipt_whose_inputs_are_encoded_again_is_left_out(films: SimpleNamespace) -> None:
    store = films.store
    films.run("abc").finish()
    before = shown_ids(store, publish_all(store))
    for info in list(store.list("_receipts/")):
        store.write(info.key, b"")  # cut off
    films.run("abcdef").finish()  # other groups
    made = publish(store, PLAIN)
    assert set(before) < set(shown_ids(store, made.snapshot))
    assert (made.snapshot.counts["rows"], made.snapshot.lineage["lost_receipts"]["costly"]) == (6, 0)
    with pytest.raises(
        PublishFailed, match=r"\(cut off\); finish with `lathe encode`, publish with the inputs to wait"
    ):
        publish(store, PLAIN)
    assert publish(store, PLAIN, listing=listed(films)).made is False


def test_a_lost_receipt_whose_rows_another_has_too_is_left_out(films: SimpleNamespace) -> None:
    """Two builds that ran at once: each encoded the same inputs, and one receipt counts."""
    store = films.store
    one, two = films.run("ab"), films.run("abc")
    one.finish()
    two.finish()
    before = shown_ids(store, publish_all(store))
    lose(store, one.committed[0])
    made = publish(store, PLAIN)
    assert shown_ids(store, made.snapshot) == before
    assert made.snapshot.lineage["lost_receipts"]["costly"] == 0


def lost_base(films: SimpleNamespace) -> str:
    """Its rows count through a retry that it is the base of."""
    films.run("ab", "storage.files_per_shard=1").finish({"b": "decode_timeout"})
    films.run("ab", retry_rejects="decode_timeout").finish()
    publish_all(films.store)
    return next(item.shard_id for item in Ledger(films.store).all() if not item.files)


def lost_unchanged(films: SimpleNamespace) -> str:
    """It says that older bytes count again."""
    path = films.folder / "a.mp4"
    for data in (b"1", b"22", b"1"):
        path.write_bytes(data)
        films.run("a").finish()
    publish_all(films.store)
    return next(item.shard_id for item in Ledger(films.store).all() if item.same_as)


def lost_rejects(films: SimpleNamespace) -> str:
    films.run("ab", "storage.files_per_shard=1").finish({"b": "too_short"})
    publish_all(films.store)
    return next(item.shard_id for item in Ledger(films.store).all() if not item.files)


@pytest.mark.parametrize("make", [lost_base, lost_unchanged, lost_rejects])
def test_a_lost_receipt_without_files_is_missed_too(films: SimpleNamespace, make) -> None:
    shard = make(films)
    before = shown_ids(films.store, Snapshots(films.store).latest())
    films.store.delete(Ledger(films.store).layout.receipt_key(shard))
    with pytest.raises(PublishFailed, match=f"1 receipt is gone .* shard {shard}; 0 of their rows"):
        publish(films.store, PLAIN)
    assert shown_ids(films.store, Snapshots(films.store).latest()) == before
    assert publish(films.store, REBUILD).snapshot.lineage["lost_receipts"]["costly"] == 1


# --- what happens meanwhile --------------------------------------------------------------------------------------------


def test_a_build_that_ends_while_receipts_are_read_is_open(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.operate import publish as module

    add_shards(store, tmp_path, range(2))
    key = Ledger(store).layout.progress_key("b")
    beat = {"build": "b", "running": True, "shards_total": 3, "shards_done": 2, "updated": time.time(), "every_s": 3e3}
    store.write(key, json.dumps(beat).encode())
    plain = module.gather

    def gather(*args: object, **options: object) -> object:
        found = plain(*args, **options)
        add_shards(store, tmp_path, range(2, 3))
        store.delete(key)
        return found

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(module, "gather", gather)
        with pytest.raises(PublishFailed, match="1 shard of the running build b"):
            publish(store, PLAIN)
    assert publish(store, PLAIN).snapshot.counts["shards"] == 3


def test_inputs_are_listed_after_receipts(films: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is added and encoded after an earlier listing would be dropped by `--removed drop`."""
    (films.folder / "f.mp4").unlink()
    films.run("abcde").finish()
    steps = []
    plain = Ledger.listed
    monkeypatch.setattr(Ledger, "listed", lambda *args, **more: (steps.append("receipts"), plain(*args, **more))[1])

    def listing() -> list:
        steps.append("inputs")
        return listed(films)

    made = publish(films.store, PublishOptions(removed="drop", delta=False), listing=listing)
    assert steps == ["receipts", "inputs"]
    assert (made.snapshot.counts["rows"], made.snapshot.lineage["listing"]["count"]) == (5, 5)


def test_inputs_that_were_left_open_stay_recorded_until_they_are_encoded(films: SimpleNamespace) -> None:
    store = films.store
    films.run("ab").finish()
    first = publish_all(store, partial=True, listing=listed(films))
    assert [Path(name).stem for name in first.open_shards] == ["c", "d", "e", "f"]
    assert publish(store, PLAIN).made is False, "nothing is new"
    assert (first.num_open, "open" in first.tables) == (4, False)
    films.run("cd").finish()
    second = publish(store, PLAIN)
    assert [Path(name).stem for name in second.snapshot.open_shards] == ["e", "f"]
    assert any("2 shards or inputs are not done" in notice for notice in second.notices)
    for name in "ef":
        (films.folder / f"{name}.mp4").unlink()
    assert publish_all(store, listing=listed(films)).open_shards == ()


def test_many_open_inputs_are_in_a_table(films: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the first of them; none is forgotten, and equal ones make no second snapshot."""
    monkeypatch.setattr("pipeline.operate.publish.NAMED_IN_RECORD", 2)
    store = films.store
    Path(os.fsdecode(os.fsencode(films.folder) + b"/g\xff.mp4")).write_bytes(b"g")
    films.run("ab").finish()
    first = publish(store, replace(PLAIN, partial=True), listing=listed(films))
    assert "5 shards or inputs are not done and not in the snapshot" in first.notices
    assert [Path(name).stem for name in first.snapshot.open_shards] == ["c", "d"]
    names = [Path(name).stem for name in Snapshots(store).open_shards(Snapshots(store).read(1))]
    assert names == ["c", "d", "e", "f", "g\\udcff"]
    assert publish(store, PLAIN).made is False
    lines = snapshots_lines({"output": "x", "snapshots": [json.loads(first.snapshot.to_json())], "damaged": []})
    assert "        partial: 5 shards or inputs were not done" in lines
    assert status(store)["num_open"] == 5
    films.run("c").finish()
    second = publish(store, PLAIN).snapshot
    assert (second.num_open, [Path(name).stem for name in second.open_shards]) == (4, ["d", "e"])


# --- shards that were encoded again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True])
def test_files_of_a_shard_that_was_encoded_again_are_checked(store: Store, tmp_path: Path, *, compacted: bool) -> None:
    """Also if its earlier rows lie in a compacted file."""
    from pipeline.config import WriteConfig
    from tests.pipeline.latent_clips import latent_clip, write_shard

    receipts = add_shards(store, tmp_path, range(2))
    publish(store, PLAIN)
    if compacted:
        compact(store, CompactOptions(delta=False))
    store.write(Ledger(store).layout.receipt_key(receipts[1].shard_id), b"")  # cut off: the shard counts as not done
    clips = [latent_clip(100 + n) for n in range(2)]
    again = Ledger(store).commit(write_shard(store, tmp_path / "spool", WriteConfig(), clips, shard=1, attempt="again"))
    (file,) = again.files
    data = store.read(file.key)
    store.write(file.key, data[:-40] + bytes(40))
    with pytest.raises(PublishFailed, match=r"files: 1 file is damaged, such as .*expected b'PAR1'"):
        publish(store, PLAIN)
    store.write(file.key, data)
    (check,) = [item for item in publish(store, PLAIN).snapshot.checks if item.name == "files"]
    assert check.numbers["read"] == 2

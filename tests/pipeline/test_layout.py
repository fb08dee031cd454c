"""Outputs of format version 1 beside those of version 2: read by every command, resumed under their own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import OutputError
from pipeline.format.layout import CURRENT, DELTA_LOG, LAYOUTS, OWN_FOLDERS, OWN_OBJECTS, is_foreign_cache
from pipeline.ledger.receipts import Ledger, orphans
from pipeline.ledger.summaries import Summaries
from pipeline.look.stored import choose, in_turns
from pipeline.operate.inspect import inspect_path
from pipeline.operate.status import status
from pipeline.operate.verify import verify_output
from pipeline.storage import Store
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard
from tests.pipeline.published import add_shards, publish_all

V1 = LAYOUTS[1]
CONFIG = StorageConfig()


def old_output(folder: Path) -> Store:
    """An output of version 1 as the first Lathe left it: four rows in one shard."""
    store = local_store(folder / "old")
    made = {"format": "latentset", "format_version": 1, "name": "old", "uuid": "u", "created": "2026-01-01"}
    store.write("latentset.json", json.dumps(made).encode())
    receipt = write_shard(store, folder / "spool", WriteConfig(), [latent_clip(n) for n in range(4)], layout=V1)
    store.write(f"receipts/{receipt.shard_id}.json", receipt.to_json())
    return store


def test_every_command_reads_an_output_of_version_1(tmp_path: Path) -> None:
    store = old_output(tmp_path)
    assert {info.key.partition("/")[0] for info in store.list()} == {"data", "index", "receipts", "latentset.json"}
    report = verify_output(store)
    assert (report.problems, report.rows, report.orphans) == ([], 4, 0)
    assert (status(store)["clips"], status(store)["name"]) == (4, "old")
    described = inspect_path(store.root, CONFIG)
    assert (described["name"], described["fingerprints"][0]["counts"]["clips"]) == ("old", 4)
    assert inspect_path(f"{store.root}/latentset.json", CONFIG)["name"] == "old"
    (item,) = choose(store).newest.files
    assert item.index_key.startswith("index/")
    assert item.index_key.endswith(".idx.parquet")
    assert inspect_path(store.uri(item.index_key), CONFIG)["kind"] == "index"
    assert len(list(in_turns(store, choose(store).receipts))) == 4


def test_an_output_of_version_1_is_continued_under_its_own_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.ledger.summaries.MIN_UNCACHED_RECEIPTS", 1)
    store = old_output(tmp_path)
    ledger = Ledger(store)
    assert ledger.prepare("another") == []
    assert ledger.layout == V1
    clips = [latent_clip(n) for n in range(4, 6)]
    ledger.commit(write_shard(store, tmp_path / "s", WriteConfig(), clips, shard=1, layout=ledger.layout))
    summaries = Summaries(store)
    assert len(summaries.all()) == 2
    summaries.save()
    assert not [info.key for info in store.list() if info.key.startswith("_")]
    assert {receipt.format_version for receipt in Ledger(store).all()} == {1}
    assert verify_output(store).rows == 6


def test_receipts_of_version_1_are_found_when_latentset_json_is_lost(tmp_path: Path) -> None:
    store = old_output(tmp_path)
    store.delete("latentset.json")
    assert verify_output(store).rows == 4
    Ledger(store).prepare("again")
    assert json.loads(store.read("latentset.json"))["format_version"] == 1
    assert verify_output(store).problems == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda item: f"version{item.version}")
def test_an_output_of_a_newer_version_is_refused(tmp_path: Path, layout) -> None:
    store = local_store(tmp_path / "out")
    store.write(layout.set_key, b'{"format": "latentset", "format_version": 3}')
    for attempt in (lambda: status(store), lambda: choose(store), lambda: Ledger(store).prepare("x")):
        with pytest.raises(OutputError, match=r"holds format version 3, this Lathe reads 1 to 2\. Choose another"):
            attempt()
    assert "format version 3" in verify_output(store).problems[0].found


def test_a_new_output_holds_nothing_but_data_under_names_that_engines_scan(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    ledger = Ledger(store)
    ledger.prepare("new")
    ledger.commit(write_shard(store, tmp_path / "s", WriteConfig(), [latent_clip(0)]))
    roots = {info.key.partition("/")[0] for info in store.list()}
    assert roots == {"data", "_index", "_receipts", "_latentset.json"}
    assert [info.key.partition("/")[0] for info in store.list() if info.key.endswith((".parquet", ".tar"))] == ["data"]


def test_names_of_every_version_are_known_as_our_own() -> None:
    for layout in LAYOUTS.values():
        assert layout.set_key in OWN_OBJECTS
        assert {layout.receipts, layout.index, layout.summaries, layout.progress} <= set(OWN_FOLDERS)
    assert CURRENT.version == max(LAYOUTS)


def test_caches_of_other_readers_are_not_called_orphans(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    ledger = Ledger(store)
    ledger.prepare("new")
    receipt = ledger.commit(write_shard(store, tmp_path / "s", WriteConfig(format="tar"), [latent_clip(0)]))
    folder = receipt.files[0].key.rpartition("/")[0]
    caches = [
        f"{receipt.files[0].key}.idx",
        f"{folder}/map_style_cache/file_info.pkl",
        f"{folder}/sharding_info_2_sp_1_dp/0.pkl",
        f"{folder}/index.json",
    ]
    for key in caches:
        store.write(key, b"x")
        assert is_foreign_cache(key)
    store.write(f"{folder}/left.tar", b"xyz")
    report = verify_output(store)
    assert (report.problems, report.orphans, report.orphan_bytes) == ([], 1, 3)
    assert any(notice.startswith("4 files (4 bytes) that another reader cached") for notice in report.notices)
    assert [info.key for info in orphans(store)] == [f"{folder}/left.tar"]


def test_the_delta_view_is_not_called_orphans(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    add_shards(store, tmp_path, range(1))
    publish_all(store)
    assert list(store.keys(DELTA_LOG))
    report = verify_output(store)
    assert (report.ok, report.orphans, report.notices) == (True, 0, [])
    assert list(orphans(store)) == []

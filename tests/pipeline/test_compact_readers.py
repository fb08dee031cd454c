"""Readers and commands after a compaction: loader, preview, status, diff, Delta view, Hugging Face, export, the command itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.export.targets import Request, export_output
from pipeline.format.layout import CURRENT, HUGGING_FACE_KEY
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset
from pipeline.look.stored import choose, encoder_of, in_turns, latent_bytes
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.delta_contents import version_key
from pipeline.operate.diff import diff
from pipeline.operate.inspect import inspect_output, inspect_snapshot
from pipeline.operate.status import status
from pipeline.storage import Store
from tests.pipeline.compacted import add_tar, delete_unnamed, make_history, rows_of, tar
from tests.pipeline.latent_clips import FINGERPRINT, local_store
from tests.pipeline.published import publish_all


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


def test_loader_preview_status_and_diff_read_the_new_snapshot(store: Store) -> None:
    expected = rows_of(store, Snapshots(store).latest())
    compact(store)
    delete_unnamed(store)
    for options in ({}, {"receipts": True}):
        with_rows = LatentDataset.open(store.root, **options)
        read = {row.id: row.latent for row in with_rows.rows()}
        assert sorted(read) == sorted(expected)
        for name, latent in read.items():
            assert np.asarray(latent).tobytes() == expected[name]["vae_latent_bytes"]
    for number in (None, 3):
        chosen = choose(store, number)
        shown = {clip.row.id: latent_bytes(store, clip) for clip in in_turns(store, chosen.receipts)}
        assert shown == {name: row["vae_latent_bytes"] for name, row in expected.items()}
        assert encoder_of(store, chosen.receipts, StorageConfig())["network"] == "tiny"
    (inspected,) = inspect_output(store)["fingerprints"]
    assert (inspected["files"], inspected["counts"]["clips"], inspected["spec"]["network"]) == (
        2,
        len(expected),
        "tiny",
    )
    assert inspect_snapshot(store, 3)["counts"]["rows"] == len(expected)
    described = status(store)
    assert (described["snapshot"]["number"], described["clips"], described["pending"]) == (3, len(expected), None)


def test_a_preview_of_one_fingerprint_shows_its_rows_and_not_the_network_of_others(tmp_path: Path) -> None:
    """The table of copies of such a snapshot has those of all fingerprints."""
    store, other = local_store(tmp_path / "out"), "ab" * 16
    Ledger(store).prepare("films")
    for number, name in enumerate("abc"):
        add_tar(store, tmp_path, name, [number], "e1")
    for number, name in enumerate("abc"):
        made = add_tar(store, tmp_path, name, [10 + number], "e1", fingerprint=other)
        parts = made.fingerprint_parts | {"encoder": {"network": "other"}}
        store.write(CURRENT.receipt_key(made.shard_id), replace(made, fingerprint_parts=parts).to_json())
    publish_all(store, delta=False)
    compact(store, CompactOptions(delta=False))
    snapshot = publish_all(store, delta=False, fingerprint=FINGERPRINT[:8])
    chosen = choose(store, snapshot.number)
    assert (chosen.newest.fingerprint, chosen.other_networks) == (FINGERPRINT, 0)
    assert sorted(clip.row.id for clip in in_turns(store, chosen.receipts)) == sorted(rows_of(store, snapshot))


def test_a_diff_says_that_files_were_rewritten_and_no_row_changed(store: Store) -> None:
    compact(store)
    found = diff((store, 2), (store, 3))
    assert found["rows"] == {"added": 0, "dropped": 0}
    assert found["files"]["rewritten"] == found["files"]["added"]
    assert len(found["files"]["rewritten"]) == 2
    assert not any(found["sources"].values())


def test_a_later_takedown_hides_rows_of_compacted_files_from_the_loader(store: Store) -> None:
    compact(store)
    dataset = LatentDataset.open(store.root)
    record_takedown(store, "asked to", samples=[(tar("a"), "dir/video00001")])
    dataset.apply_takedowns(dataset.read_takedowns())
    assert {"video00001-0000", "video00001-0001"} <= {name for _, name in dataset.hidden_rows()}


def test_the_delta_view_has_rows_back_that_shared_a_file_with_hidden_ones(store: Store) -> None:
    """Such files are left out of the view. Where no row comes or goes, the version says that it changes no data."""
    from deltalake import DeltaTable

    first = compact(store)
    assert first.delta.hidden_rows == 0
    expected = rows_of(store, first.snapshot)

    def version(number: int) -> tuple[dict[str, bytes], set[bool]]:
        table = DeltaTable(store.uri("data"), version=number).to_pyarrow_table()
        values = dict(zip(table["id"].to_pylist(), table["vae_latent_bytes"].to_pylist(), strict=True))
        lines = [json.loads(line) for line in store.read(version_key(number)).splitlines()]
        return values, {
            item["dataChange"] for line in lines for name, item in line.items() if name in ("add", "remove")
        }

    wanted = {name: row["vae_latent_bytes"] for name, row in expected.items()}
    assert version(3) == (wanted, {True})
    assert len(version(2)[0]) < len(wanted)
    publish_all(store)
    assert version(3)[0] == wanted


def test_a_compaction_without_hidden_rows_changes_no_data_of_the_delta_view(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    for number, name in enumerate("abc"):
        add_tar(store, tmp_path, name, [number], "e1")
    publish_all(store)
    compact(store)
    lines = [json.loads(line) for line in store.read(version_key(2)).splitlines()]
    changes = [item["dataChange"] for line in lines for name, item in line.items() if name in ("add", "remove")]
    assert changes == [False] * 8, "six files of three tars and two buckets go, two come"


def test_hugging_face_reads_each_row_once(store: Store) -> None:
    snapshot = compact(store).snapshot
    (entry,) = yaml.safe_load(store.read(HUGGING_FACE_KEY))["configs"]
    ids = [name for key in entry["data_files"] for name in pq.read_table(store.uri(key))["id"].to_pylist()]
    assert len(set(ids)) == len(ids)
    assert set(rows_of(store, snapshot)) <= set(ids)


def test_an_export_that_goes_on_with_the_new_snapshot_keeps_every_row(store: Store, tmp_path: Path) -> None:
    request = Request("wds", normalize="none")
    first = export_output(store.root, str(tmp_path / "wds"), request, StorageConfig())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "wds").rglob("*.tar")}
    compact(store)
    delete_unnamed(store)
    again = export_output(store.root, str(tmp_path / "wds"), request, StorageConfig())
    assert (again.snapshot, again.kept, again.added, again.removed) == (3, first.rows, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "wds").rglob("*.tar")} == written


def test_the_command_says_what_it_did(store: Store) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["compact", store.root, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert run("--dry-run").startswith(
        "would make a snapshot of the rows of snapshot 2: 8 files become 2, without 4 rows that do not count; "
    )
    assert run("--target-bytes", "64MiB").startswith(
        "snapshot 3: the rows of snapshot 2; 8 files become 2, without 4 rows that do not count\n  bytes     "
    )
    assert run() == "nothing to do: no file is small or has rows that do not count\n"
    assert json.loads(run("--json"))["snapshot"] is None
    listed = CliRunner().invoke(app, ["snapshots", store.root]).stdout
    assert "compacted: 8 files became 2" in listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-bytes", "512 parrots"], "expected a size of at least 1MB, such as 512MB, got '512 parrots'"),
        (["--target-bytes", "1000"], "expected a size of at least 1MB"),
    ],
)
def test_a_wrong_size_is_refused(store: Store, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["compact", store.root, *arguments])
    assert (result.exit_code, words in result.stderr) == (2, True), result.output
    assert CliRunner().invoke(app, ["compact", f"{store.root}@2"]).exit_code == 2

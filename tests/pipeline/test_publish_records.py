"""Records of snapshots that are not what was published, what `lathe verify` says of them, and publishers that are interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import AccessError, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.storage import Store
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards

PLAIN = PublishOptions(delta=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    add_shards(made, tmp_path, range(1))
    publish(made, PLAIN)
    return made


# --- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"number": 7}, "it is the record of snapshot 7"),
        ({"number": True}, "number is True, expected a number from 1"),
        ({"parent": 5}, "parent is 5, expected a lower number"),
        ({"created": "yesterday"}, "Invalid isoformat string: 'yesterday'"),
        ({"counts": {}}, r"counts is \[\], expected also shards, samples"),
        ({"counts": None}, "counts is None, expected an object"),
        ({"rejects": {"too_short": "3"}}, "rejects.too_short is '3', expected a number from 0"),
        ({"changes": {}}, "changes is"),
        ({"buckets": []}, "has no attribute 'items'"),
        ({"fingerprints": {}}, "shards of all fingerprints is 0, expected 1"),
        ({"tables": {}}, r"tables is \[\], expected files and receipts"),
        ({"open_shards": "abc"}, "open_shards is 'abc', expected a list of strings"),
        ({"lineage": []}, "lineage is"),
    ],
)
def test_a_record_that_contradicts_itself_is_damaged(store: Store, change: dict, words: str) -> None:
    raw = json.loads(store.read("_snapshots/1.json"))
    store.write("_snapshots/1.json", json.dumps({**raw, **change}).encode())
    with pytest.raises(OutputError, match=rf"_snapshots/1.json cannot be read as a snapshot: .*{words}.*--rebuild"):
        Snapshots(store).read(1)
    for number in (None, 1):
        (problem,) = verify_output(store, snapshot=number).problems
        assert (problem.file, problem.expected) == ("snapshot 1", "its record and tables as published")


def test_a_copy_of_an_older_record_is_passed_over(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(1, 2))
    publish(store, PLAIN)
    store.write("_snapshots/3.json", store.read("_snapshots/1.json"))
    with pytest.raises(OutputError, match="it is the record of snapshot 1"):
        publish(store, PLAIN)
    rebuilt = publish(store, PublishOptions(delta=False, rebuild=True)).snapshot
    assert (rebuilt.number, rebuilt.parent, rebuilt.counts["rows"], rebuilt.changes["rows_added"]) == (4, 2, 4, 0)
    report = verify_output(store)
    assert report.ok
    assert any("snapshot 3 is damaged, a later one passed over it" in notice for notice in report.notices)


@pytest.mark.parametrize("name", ["files", "receipts"])
def test_verify_reports_a_lost_table(store: Store, name: str) -> None:
    store.delete(Snapshots(store).read(1).tables[name].key)
    for number in (None, 1):
        (problem,) = verify_output(store, snapshot=number).problems
        assert "snapshot 1 lacks its table" in problem.found


def test_verify_reports_a_takedown_that_cannot_be_read(store: Store) -> None:
    record_takedown(store, "asked", sources=["s3://corpus/shard-000.tar"])
    assert not [notice for notice in verify_output(store).notices if "count in another receipt" in notice]
    store.write("_takedowns/x.json", b"{}")
    for number in (None, 1):
        (problem,) = verify_output(store, snapshot=number).problems
        assert (problem.file, "_takedowns/x.json cannot be read" in problem.found) == ("_takedowns/", True)


def test_a_snapshot_of_an_earlier_version_is_read_and_published_on(store: Store, tmp_path: Path) -> None:
    """Its table of receipts and its record do not count source videos."""
    snapshots = Snapshots(store)
    path = tmp_path / "receipts"
    pq.write_table(snapshots.table(snapshots.read(1), "receipts").drop_columns("videos"), path)
    raw = json.loads(store.read("_snapshots/1.json"))
    del raw["videos"]
    raw["tables"] |= {"receipts": asdict(snapshots.write_tables(1, {"receipts": path})["receipts"])}
    store.write("_snapshots/1.json", json.dumps(raw).encode())
    assert verify_output(store, snapshot=1).ok
    add_shards(store, tmp_path, range(1, 2), videos=({"px720": 2},))
    found = publish(store, PLAIN).snapshot
    assert (found.counts["rows"], found.videos) == (4, {"encoded": {"px720": 2}})
    assert snapshots.table(found, "receipts")["videos"].null_count == 1


# --- interrupted publishers --------------------------------------------------------------------------------------------


def call(store: Store, *more: str) -> object:
    return CliRunner().invoke(app, ["publish", store.root, "--canary", "0", *more])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ((DeltaLog, "check"), "stopped; nothing was published; run the same command again"),
        ((Snapshots, "create"), "stopped; snapshot 2 may be published: `lathe snapshots"),
        ((DeltaLog, "sync"), "stopped; snapshot 2 is published; run the same command again to bring the Delta view"),
    ],
)
def test_an_interrupted_publisher_says_what_it_did(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], words: str
) -> None:
    add_shards(store, tmp_path, range(1, 2))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    result = call(store)
    assert result.exit_code == 130
    assert words in result.stderr


def test_a_view_that_fails_is_an_object_with_json(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_shards(store, tmp_path, range(1, 2))

    def refuse(self: DeltaLog) -> None:
        raise AccessError("access denied")

    monkeypatch.setattr(DeltaLog, "sync", refuse)
    result = call(store, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["made"], found["snapshot"]["number"]) == (2, True, 2)
    assert "its Delta view was not written: access denied" in found["error"]
    again = call(store)
    assert "snapshot 2 is published, but its Delta view was not written" in again.stderr


# --- output for programs ----------------------------------------------------------------------------------------------


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    """Of checks that fail and of statistics."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    (receipt,) = add_shards(store, tmp_path, range(1))
    stats = replace(receipt.stats, mean=(math.nan,) * 4, max=(math.inf,) * 4)
    store.write(f"_receipts/{receipt.shard_id}.json", replace(receipt, stats=stats).to_json())
    failed = json.loads(call(store, "--json").stdout, parse_constant=refuse_constant)
    (constants,) = [check for check in failed["checks"] if check["name"] == "constants"]
    assert constants["numbers"][receipt.fingerprint]["mean"] is None
    result = CliRunner().invoke(app, ["stats", store.root, "--json"])
    found = json.loads(result.stdout, parse_constant=refuse_constant)["fingerprints"][receipt.fingerprint]["exact"]
    assert (found["mean"], found["max"]) == ([None] * 4, [None] * 4)


def test_floors_have_to_be_numbers(store: Store) -> None:
    for name in ("--psnr-floor", "--ssim-floor"):
        result = call(store, name, "nan")
        assert (result.exit_code, f"{name}: expected a number" in result.stderr) == (2, True)


def test_a_damaged_record_that_was_asked_for_is_an_error(store: Store) -> None:
    """In the list of all it is a line."""
    store.write("_snapshots/1.json", b"{}")
    codes = {}
    for name in (store.root, f"{store.root}@1"):
        for more in ([], ["--json"]):
            result = CliRunner().invoke(app, ["snapshots", name, *more])
            assert "_snapshots/1.json cannot be read as a snapshot" in result.stdout + result.stderr
            codes.setdefault(name, []).append(result.exit_code)
    assert codes == {store.root: [0, 0], f"{store.root}@1": [1, 1]}

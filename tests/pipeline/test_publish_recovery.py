"""Publishing an output that is damaged: files with the right size, lost tables and records, empty records, facts that could not be read."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import WriteConfig
from pipeline.errors import AccessError, OutputError, PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.status import status
from pipeline.records import Receipt, Reject
from pipeline.storage import Store
from pipeline.storage.local import LocalStore
from tests.pipeline.frameless_build import Careless, NoConditions
from tests.pipeline.latent_clips import latent_clip, local_store, receipt_of, write_shard
from tests.pipeline.published import add_shards, listed, publish_all, shown_ids

PLAIN = PublishOptions(delta=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


# --- files that have their size ----------------------------------------------------------------------------------------


def overwrite(store: Store, key: str, at: int, data: bytes) -> None:
    """Replaces bytes, counted from the end."""
    old = store.read(key)
    store.write(key, old[: len(old) - at] + data + old[len(old) - at + len(data) :])


def damaged_magic(store: Store, receipt: Receipt) -> None:
    overwrite(store, receipt.files[0].key, 4, b"\0\0\0\0")


def damaged_footer(store: Store, receipt: Receipt) -> None:
    overwrite(store, receipt.files[0].key, 1000, bytes(900))


def damaged_length(store: Store, receipt: Receipt) -> None:
    overwrite(store, receipt.files[0].key, 8, b"\xff\xff\xff\x7f")


def another_file(store: Store, receipt: Receipt) -> None:
    """A whole Parquet file of the same size with other rows."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"row": [1]}), out)
    data = out.getvalue()
    size = receipt.files[0].num_bytes
    store.write(receipt.files[0].key, bytes(size - len(data)) + data)


def damaged_index(store: Store, receipt: Receipt) -> None:
    overwrite(store, receipt.files[0].index_key, 600, b"\0\0")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_magic, r"it ends with b'\\x00\\x00\\x00\\x00', expected b'PAR1'"),
        (damaged_footer, "its footer cannot be read"),
        (damaged_length, "its footer cannot be read"),
        (another_file, "its footer says 1 rows, expected 2"),
        (damaged_index, r"_index/.*sha256 .*expected"),
    ],
)
def test_a_new_file_that_is_damaged_and_has_its_size_fails(store: Store, tmp_path: Path, damage, words: str) -> None:
    receipts = add_shards(store, tmp_path, range(3))
    damage(store, receipts[1])
    with pytest.raises(PublishFailed, match=f"files: 1 file is damaged, such as .*{words}") as caught:
        publish(store, PLAIN)
    (check,) = [check for check in caught.value.checks if check.name == "files"]
    assert (check.numbers["damaged"], check.numbers["read"], check.numbers["other_size"]) == (1, 6, 0)


def test_files_that_the_parent_has_are_not_read_again(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(2))
    publish(store, PLAIN)
    add_shards(store, tmp_path, range(2, 3))
    (check,) = [check for check in publish(store, PLAIN).snapshot.checks if check.name == "files"]
    assert (check.numbers["files"], check.numbers["read"]) == (6, 2)


def test_a_tar_that_lost_its_end_fails(store: Store, tmp_path: Path) -> None:
    receipt = write_shard(store, tmp_path / "spool", WriteConfig(format="tar"), [latent_clip(1)])
    Ledger(store).commit(receipt)
    assert publish(store, PLAIN).made
    other = write_shard(store, tmp_path / "spool", WriteConfig(format="tar"), [latent_clip(2)], shard=1, attempt="a2")
    Ledger(store).commit(other)
    overwrite(store, other.files[0].key, 700, b"\1")
    with pytest.raises(PublishFailed, match="it does not end with two blocks of zeros"):
        publish(store, PLAIN)


# --- snapshots that are damaged ----------------------------------------------------------------------------------------


def lose(store: Store, number: int, name: str) -> None:
    store.delete(Snapshots(store).read(number).tables[name].key)


def corrupt(store: Store, number: int, name: str) -> None:
    overwrite(store, Snapshots(store).read(number).tables[name].key, 100, b"\0\0\0\0")


def garble(store: Store, number: int, name: str) -> None:
    store.write(f"_snapshots/{number}.json", b"{")


@pytest.mark.parametrize("name", ["files", "receipts"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, "snapshot 2 lacks its table _snapshots/2/"),
        (corrupt, "is not the table that was published"),
        (garble, r"_snapshots/2.json cannot be read as a snapshot"),
    ],
)
def test_a_damaged_newest_snapshot_is_passed_over_on_request(
    store: Store, tmp_path: Path, damage, words: str, name: str
) -> None:
    add_shards(store, tmp_path, range(2))
    publish(store, PLAIN)
    add_shards(store, tmp_path, range(2, 3))
    expected = shown_ids(store, publish(store, PLAIN).snapshot)
    damage(store, 2, name)
    advice = f"{words}.*restore it, or .*lathe publish {store.root} --rebuild"
    for call in (lambda: publish(store, PLAIN), lambda: Snapshots(store).table(Snapshots(store).get(None), name)):
        with pytest.raises(OutputError, match=advice):
            call()
    rebuilt = publish(store, replace(PLAIN, rebuild=True))
    assert (rebuilt.snapshot.number, rebuilt.snapshot.parent, rebuilt.snapshot.changes["inputs_added"]) == (3, 1, 1)
    assert shown_ids(store, rebuilt.snapshot) == expected
    assert any("passed over a damaged snapshot" in notice for notice in rebuilt.notices)
    assert publish(store, PLAIN).made is False, "the new snapshot is whole"
    assert status(store)["snapshot"]["number"] == 3


def test_receipts_alone_make_a_snapshot_if_no_other_is_whole(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(2))
    expected = shown_ids(store, publish(store, PLAIN).snapshot)
    lose(store, 1, "files")
    rebuilt = publish(store, replace(PLAIN, rebuild=True)).snapshot
    assert (rebuilt.number, rebuilt.parent, shown_ids(store, rebuilt)) == (2, None, expected)
    assert publish(store, replace(PLAIN, rebuild=True)).made is False, "nothing is damaged any more that counts"


def test_a_rebuilt_snapshot_keeps_what_was_dropped_if_that_is_known(workspace) -> None:
    store = workspace.store
    Ledger(store).prepare("films")
    workspace.run("abc").finish()
    (workspace.folder / "a.mp4").unlink()
    for name in "def":
        (workspace.folder / f"{name}.mp4").unlink()
    dropped = publish_all(store, listing=listed(workspace), removed="drop")
    lose(store, 1, "receipts")
    rebuilt = publish(store, PublishOptions(rebuild=True, delta=False))
    assert shown_ids(store, rebuilt.snapshot) == shown_ids(store, dropped)
    assert not any("dropped" in notice for notice in rebuilt.notices)
    lose(store, 2, "choices")
    rebuilt = publish(store, PublishOptions(rebuild=True, delta=False))
    assert rebuilt.snapshot.counts["rows"] == 3
    assert any("which inputs snapshot 2 dropped is not known" in notice for notice in rebuilt.notices)


def test_the_delta_view_of_a_damaged_snapshot_is_left_out(store: Store, tmp_path: Path) -> None:
    import polars as pl

    shown = []
    for number in range(3):
        add_shards(store, tmp_path, range(number, number + 1))
        shown.append(shown_ids(store, publish(store, PublishOptions()).snapshot))
    lose(store, 3, "files")
    rebuilt = publish(store, PublishOptions(rebuild=True))
    assert rebuilt.snapshot.passed_over == (3,)

    def versions() -> list[list[str]]:
        return [
            sorted(pl.scan_delta(store.uri("data"), version=version).select("id").collect()["id"].to_list())
            for version in range(1, Snapshots(store).numbers()[-1] + 1)
        ]

    assert versions() == [shown[0], shown[1], shown[1], shown[2]]
    lose(store, 1, "files")
    record_takedown(store, "asked", ids=[shown[0][0]])  # all versions are written anew, for which each table is needed
    with pytest.raises(OutputError, match=r"snapshot 1 lacks its table .* --rebuild"):
        publish(store, PublishOptions())
    again = publish(store, PublishOptions(rebuild=True))
    assert (again.made, again.snapshot.passed_over) == (True, (1, 3))
    gone = {row for row in shown[0]}  # the Delta view leaves out whole files
    assert versions()[-1] == [row for row in shown[2] if row not in gone]
    assert publish(store, PublishOptions()).made is False


def test_snapshots_are_listed_beside_a_damaged_record(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(1))
    publish(store, PLAIN)
    garble(store, 2, "")
    publish(store, replace(PLAIN, rebuild=True))
    lines = CliRunner().invoke(app, ["snapshots", store.root]).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:] if line.startswith("     ") and line.split()[0].isdigit()] == [
        "1",
        "3",
        "2",
    ]
    assert "passed over damaged snapshots: 2" in lines[-2]
    assert "_snapshots/2.json cannot be read as a snapshot" in lines[-1]


def test_a_snapshot_of_another_version_is_not_passed_over(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(1))
    publish(store, PLAIN)
    store.write("_snapshots/2.json", b'{"format": "latentset-snapshot", "format_version": 9}')
    with pytest.raises(OutputError, match="format version 9, this Lathe reads 1; use the Lathe that made it"):
        publish(store, replace(PLAIN, rebuild=True))


def test_an_empty_record_far_ahead_costs_no_numbers(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(1))
    publish(store, PublishOptions())
    for number in (2, 3000):
        store.write(f"_snapshots/{number}.json", b"")
    add_shards(store, tmp_path, range(1, 2))
    assert publish(store, PublishOptions()).snapshot.number == 3
    assert len(list(store.list("data/_delta_log/"))) < 10


# --- facts that the parent lacks ---------------------------------------------------------------------------------------


def test_constants_are_read_once_there_is_a_file_to_read_them_from(store: Store, tmp_path: Path) -> None:
    reject = Reject(
        "k", "clips", "too_short", "got 3 frames, expected 17", policy=True, uri="s3://corpus/shard-007.tar"
    )
    Ledger(store).commit(receipt_of((), None, shard=7, rejects=(reject,)))
    (empty,) = publish(store, PLAIN).snapshot.fingerprints.values()
    assert (empty.rows, empty.constants["scale"], empty.network) == (0, None, "")
    add_shards(store, tmp_path, range(1))
    snapshot = publish(store, PLAIN).snapshot
    (found,) = snapshot.fingerprints.values()
    assert (found.rows, found.constants["scale"], found.network) == (2, 0.5, "tiny")
    (check,) = [check for check in snapshot.checks if check.name == "constants"]
    assert check.judged


# --- what a publisher is told ------------------------------------------------------------------------------------------


def test_a_publisher_in_between_is_noticed_also_before_anything_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parent and number come from one listing: a snapshot made after it takes that number, whatever its parent is."""
    add_shards(store, tmp_path, range(1))
    publish(store, PLAIN)
    add_shards(store, tmp_path, range(1, 2))
    plain, others = Snapshots.read, []

    def read(self: Snapshots, number: int) -> Snapshot:
        found = plain(self, number)
        if not others:  # the first read follows the listing
            others.append(None)
            others[0] = publish(store, PLAIN).snapshot
        return found

    monkeypatch.setattr(Snapshots, "read", read)
    with pytest.raises(PublishFailed, match="another publisher was first: snapshot 2 of"):
        publish(store, PLAIN)
    assert (Snapshots(store).numbers(), Snapshots(store).latest()) == ([1, 2], others[0])


@pytest.mark.parametrize("kind", [Careless, NoConditions])
def test_a_store_that_lets_both_write_does_not_let_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LocalStore]
) -> None:
    """Two publishers of the same receipts, within one tick of the clock, write different records: each knows whose stayed."""
    store = kind(str(tmp_path / "out"))
    Ledger(store).prepare("films")
    add_shards(store, tmp_path, range(1))
    plain = kind.put_if_absent

    def both(self: LocalStore, key: str, data: bytes) -> bool:
        made = plain(self, key, data)
        if key.startswith("_snapshots/"):  # the other one writes after this one, and before it reads back
            record = Snapshot.from_json(data)
            plain(self, key, replace(record, lineage={**record.lineage, "publisher": "0" * 16}).to_json())
        return made

    monkeypatch.setattr(kind, "put_if_absent", both)
    with pytest.raises(PublishFailed, match="another publisher was first: snapshot 1 of"):
        publish(store, PLAIN)
    assert Snapshots(store).read(1).lineage["publisher"] == "0" * 16


def test_no_two_records_are_equal(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the publisher that came second would take the first one's record for its own."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2026, 11, 28, tzinfo=tz)

    monkeypatch.setattr("pipeline.operate.snapshot_record.datetime", Clock)
    add_shards(store, tmp_path, range(1))
    records = []
    for _ in range(2):
        records.append(publish(store, PLAIN).snapshot)
        store.delete("_snapshots/1.json")
    assert records[0].created == records[1].created
    assert records[0].to_json() != records[1].to_json()
    assert replace(records[0], lineage={}) == replace(records[1], lineage={})


def test_a_view_that_cannot_be_written_is_said_beside_the_snapshot(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_shards(store, tmp_path, range(1))

    def refuse(self: DeltaLog) -> None:
        raise AccessError("access denied")

    with monkeypatch.context() as broken:
        broken.setattr(DeltaLog, "sync", refuse)
        words = "snapshot 1 is published, but its Delta view was not written: access denied; publish again to write it, or use --no-delta"
        with pytest.raises(OutputError, match=words):
            publish(store, PublishOptions())
    assert Snapshots(store).numbers() == [1]
    again = publish(store, PublishOptions())
    assert (again.made, again.delta is not None, DeltaLog(store).sync()) == (False, True, again.delta)


def test_a_failed_publish_prints_the_numbers_of_all_checks(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(1))
    store.delete(receipts[0].files[0].key)
    plain, as_json = (
        CliRunner().invoke(app, ["publish", store.root, "--canary", "0", *more]) for more in ([], ["--json"])
    )
    assert (plain.exit_code, as_json.exit_code) == (1, 1)
    assert "check     files: FAILED (files 2, missing 1" in plain.stdout
    assert "lathe: error: snapshot 1 was not published, 1 of 6 checks failed: files" in plain.stderr
    found = json.loads(as_json.stdout)
    assert (found["made"], found["error"].startswith("snapshot 1 was not published")) == (False, True)
    assert {item["name"]: item["ok"] for item in found["checks"]}["files"] is False
    (files,) = [item for item in found["checks"] if item["name"] == "files"]
    assert files["numbers"]["missing"] == 1

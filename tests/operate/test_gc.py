"""`lathe gc`: what it deletes and keeps, retention, retiring receipts, takedowns, builds, kills."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import deltalake
import pytest

from pipeline.cli.maintenance_wording import gc_lines
from pipeline.engine.driver.coverage import find_work
from pipeline.errors import InputError, OutputError, PublishFailed
from pipeline.format.layout import CURRENT, RETIRED, night_report_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.operate.compact import compact
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.takedown import take_down, undo
from pipeline.operate.verify import verify_output
from pipeline.records import Bucket, Counts, Shard, SourceObject
from pipeline.storage import Store
from tests.operate.outputs import (
    NEWEST,
    aged,
    files_of,
    listing,
    receipt_for,
    shown,
    snapshot_numbers,
    stored,
    tar,
    write_files,
    write_version,
)
from tests.pipeline.frameless_build import job_for
from tests.pipeline.latent_clips import FINGERPRINT, latent_clip
from tests.pipeline.published import publish_all


def test_only_what_no_receipt_names_goes_while_all_snapshots_are_kept(store: Store, tmp_path: Path) -> None:
    """Files of a second attempt, tables of a killed publisher, hidden files of killed writers. Young ones stay, and so does what Lathe did
    not make.
    """
    loser = files_of(write_files(store, tmp_path, tar("a", "e1"), [latent_clip(0)], attempt="a2"))
    foreign = {"data/f0e1d2c3/v17x64x48/notes.parquet", "data/mine.tar", "_index/odd.idx"}
    heartbeat, table, probe = (
        "_progress/20260101T000000Z-ab.json",
        "_snapshots/9/files-0123456789abcdef.idx",
        ".lathe-probe-1",
    )
    for key in (*foreign, table, probe):
        store.write(key, b"{}")
    hidden = Path(store.uri("data/.lathe-tmp-dead"))
    hidden.write_bytes(b"half")
    before = listing(store)
    first = collect(store)
    assert (first["deleted"]["orphan"]["files"], first["kept"]["young"]) == (0, 1)
    assert hidden.exists()
    store.write(heartbeat, b"{}")
    odd = [*loser, *foreign, table, probe, heartbeat]
    aged(store, keys=[*odd, "data/.lathe-tmp-dead"])
    found = collect(store)
    assert found["deleted"]["orphan"]["files"] == 1
    assert [found["deleted"][name] for name in ("heartbeats", "scratch")] == [1, 1]
    assert (found["deleted"]["tables"]["files"], found["deleted"]["leftovers"]["files"]) == (1, 1)
    assert found["foreign"]["objects"] == 3
    assert set(found["foreign"]["names"]) == foreign
    assert not hidden.exists()
    left = {key for key in listing(store) if not key.startswith("_leases/")}
    assert left == before.keys() - set(odd) | foreign
    assert found["snapshots"] == {"retained": [1, 2, 3], "retired": [], "forgotten": []}


def test_old_snapshots_go_and_readers_of_the_others_miss_nothing(store: Store) -> None:
    second, third = shown(store, 2), shown(store, 3)
    dry = collect(store, GcOptions(keep_snapshots=2, keep_days=0, dry_run=True))
    found = collect(store, GcOptions(keep_snapshots=2, keep_days=0))
    assert {**dry, "dry_run": False} == found
    assert found["snapshots"]["retired"] == [1]
    assert snapshot_numbers(store) == [2, 3]
    assert not [key for key in store.keys("_snapshots/1/")]
    assert (shown(store, 2), shown(store, 3)) == (second, third)
    with pytest.raises(InputError, match="has no snapshot 1; there are 2, 3"):
        shown(store, 1)
    tables = [deltalake.DeltaTable(store.uri("data"), version=number).to_pyarrow_table() for number in (2, 3)]
    assert [set(table["id"].to_pylist()) for table in tables] == [second, third]
    with pytest.raises(Exception, match="No files in log segment"):
        deltalake.DeltaTable(store.uri("data"), version=1)
    assert publish_all(store).number == 3
    assert verify_output(store).problems == []


def test_young_snapshots_are_kept_whatever_their_number(store: Store) -> None:
    assert collect(store, GcOptions(keep_snapshots=1, keep_days=4))["snapshots"]["retired"] == []
    assert collect(store, GcOptions(keep_snapshots=1, keep_days=2))["snapshots"]["retired"] == [1, 2]


def test_a_replaced_version_retires_first_and_its_files_go_a_grace_time_later(store: Store, tmp_path: Path) -> None:
    old, fourth = receipt_for(store, "b"), shown(store, 3)
    found = collect(store, NEWEST)
    assert (found["receipts"]["retired"], found["waiting"]["files"]) == (1, 1)
    assert files_of(old) <= stored(store)
    assert Ledger(store).read(old.shard_id) is None
    assert store.read(f"{RETIRED}{old.shard_id}--a1.json") == old.to_json()
    assert publish_all(store).number == 3, "nothing changed"
    assert verify_output(store).problems == []
    assert collect(store, NEWEST)["deleted"]["replaced"]["files"] == 0, "its grace time begins when it retires"
    aged(store, keys=store.keys(RETIRED))
    assert collect(store, NEWEST)["deleted"]["replaced"]["files"] == 1
    assert not files_of(old) & stored(store)
    write_version(store, tmp_path, "d", "e1", (30,))
    fifth = publish_all(store)
    assert (fifth.number, fifth.counts["rows"]) == (4, 6)
    assert shown(store) > fourth
    assert verify_output(store).problems == []
    # The input goes back to its first version: it is encoded again, under the key of the receipt that retired.
    again = [tar("b", "e1")]
    work = find_work(again, Summaries(store).all(), FINGERPRINT, job_for(tmp_path))
    assert work.tars == again
    assert write_version(store, tmp_path, "b", "e1", (10, 11), attempt="a9").attempt == "a9"
    publish_all(store, listing=[again[0].objects[0]])
    assert {"video00010-0000", "video00011-0000"} <= shown(store)


def test_a_retired_receipt_that_a_late_publisher_shows_comes_back(store: Store) -> None:
    """The publisher read the receipt before gc moved it, and its listing has the older version again."""
    old = receipt_for(store, "b")
    collect(store, NEWEST)
    retired = f"{RETIRED}{old.shard_id}--a1.json"
    moved = store.read(retired)
    store.write(Ledger(store).layout.receipt_key(old.shard_id), moved)
    publish_all(store, listing=[old.shard.objects[0]])
    store.delete(Ledger(store).layout.receipt_key(old.shard_id))
    aged(store, keys=[retired])
    assert collect(store, NEWEST)["receipts"]["restored"] == 1
    assert Ledger(store).read(old.shard_id) == old
    assert files_of(old) <= stored(store)
    assert {"video00010-0000", "video00011-0000"} <= shown(store)
    assert verify_output(store).problems == []


def test_receipts_newer_than_the_last_snapshot_keep_their_files(store: Store, tmp_path: Path) -> None:
    pending = write_version(store, tmp_path, "d", "e1", (30,))
    aged(store, keys=files_of(pending))
    assert collect(store, NEWEST)["kept"]["pending"] == 1
    assert files_of(pending) <= stored(store)
    publish_all(store)
    assert "video00030-0000" in shown(store)


def test_tables_of_the_next_snapshot_stay_for_an_hour_whatever_the_grace_time(store: Store) -> None:
    next_, second = (f"_snapshots/{number}/files-0123456789abcdef.idx" for number in (4, 3))
    for key in (next_, second):
        store.write(key, b"of a publisher that is about to create the record, or was second")
    collect(store, replace(NEWEST, grace_s=0.0))
    assert (store.exists(next_), store.exists(second)) == (True, False)
    aged(store, days=0.1, keys=[next_])
    collect(store, replace(NEWEST, grace_s=0.0))
    assert not store.exists(next_)


def test_a_publisher_that_is_overtaken_cannot_create_a_number_that_gc_freed(store: Store) -> None:
    """Its tables are gone with those of the snapshot that had the number."""
    late = Snapshots(store).read(2)
    collect(store, NEWEST)
    assert snapshot_numbers(store) == [3]
    with pytest.raises(PublishFailed, match="another publisher was first"):
        Snapshots(store).create(late)
    assert snapshot_numbers(store) == [3]


# --- takedowns --------------------------------------------------------------------------------------------------------


def test_bytes_of_a_taken_down_source_go_with_the_snapshots_that_name_them(store: Store) -> None:
    taken = receipt_for(store, "a")
    uri = taken.shard.objects[0].uri
    record = take_down(store, [uri], reason="asked", by="ann")["record"]
    old = json.loads(store.read(record)) | {"created": "2026-01-01T00:00:00+00:00"}
    store.write(record, json.dumps(old).encode())
    everything = shown(store, 3)
    fourth = publish_all(store)
    store.write(f"{RETIRED}notes.txt", b"of the user")
    store.write(f"{RETIRED}{'0' * 32}--a1.json", b"")  # of a gc that was killed, on a mount
    kept = collect(store)
    (left,) = kept["takedowns"]["stored"]
    assert (left["files"], left["snapshots"]) == (1, [1, 2, 3])
    assert files_of(taken) <= stored(store)
    dry = collect(store, GcOptions(forget=True, dry_run=True))
    found = collect(store, GcOptions(forget=True))
    assert {**dry, "dry_run": False} == found
    assert found["snapshots"] == {"retained": [4], "retired": [1, 2, 3], "forgotten": [1, 2, 3]}
    assert found["deleted"]["taken_down"]["files"] == 1
    assert found["takedowns"]["names_removed"] == [record]
    assert not files_of(taken) & stored(store)
    assert uri.encode() not in store.read(record)
    assert shown(store) == everything
    assert verify_output(store).problems == []
    assert verify_output(store, snapshot=4).problems == []
    assert publish_all(store).number == fourth.number
    assert read_takedowns(store).takes(uri), "a later build does not encode it"
    with pytest.raises(OutputError, match="cannot be undone: its bytes are gone"):
        undo(store, uri, reason="", by="")


def two_buckets(store: Store, folder: Path) -> tuple[object, list[str]]:
    """A receipt of three plain files: two in one bucket, the third alone in another."""
    uris = [f"s3://corpus/{name}.mp4" for name in "xyz"]
    shard = Shard("files", "files 0", tuple(SourceObject(uri, 10, "e") for uri in uris))
    buckets = (Bucket(17, 64, 48), Bucket(17, 64, 48), Bucket(9, 32, 24))
    clips = [
        latent_clip(40 + n, uri=uri, key=uri[-5], bucket=buckets[n], num_frames=buckets[n].frames)
        for n, uri in enumerate(uris)
    ]
    return Ledger(store).commit(write_files(store, folder, shard, clips)), uris


def test_a_file_all_of_whose_rows_are_taken_down_goes_although_its_receipt_counts(store: Store, tmp_path: Path) -> None:
    receipt, uris = two_buckets(store, tmp_path)
    publish_all(store)
    record_takedown(store, "asked", sources=[uris[2]])
    publish_all(store)
    aged(store)
    small = next(item for item in receipt.files if item.bucket.startswith("v9"))
    found = collect(store, NEWEST)
    assert found["deleted"]["taken_down"]["files"] == 1
    assert {small.key, small.index_key}.isdisjoint(stored(store))
    assert verify_output(store).problems == []
    record_takedown(store, "asked", sources=[uris[1]])  # the receipt is read again
    sixth = publish_all(store)
    assert sixth.counts["rows"] == 6
    (stats,) = [item.stats for item in sixth.fingerprints.values()]
    assert stats.n * 4 == sum(row.latent.numel() for row in rows_of(store))
    assert verify_output(store).problems == []


def write_runs(store: Store, *builds: str) -> list[str]:
    keys = [CURRENT.run_log_key(build, part) for build in builds for part in (1, 2)]
    keys += [night_report_key(build) for build in builds]
    for key in keys:
        store.write(key, b"{}\n")
    return keys


def test_logs_and_reports_of_runs_go_by_age_and_with_what_was_taken_down(store: Store) -> None:
    """The first part of the log of a build that runs for long is old. What Lathe did not write stays."""
    old, young, running = "20260101T000000Z-aaaaaaaa", "20260201T000000Z-bbbbbbbb", "20260102T000000Z-cccccccc"
    keys = {build: write_runs(store, build) for build in (old, young, running)}
    notes = "_runs/notes.txt"
    store.write(notes, b"mine")
    aged(store, 40, [notes, *keys[old], *keys[running], *keys[young][:1]])
    now = datetime.now(UTC).timestamp()
    beat = {"build": running, "started": now, "updated": now, "every_s": 30.0, "running": True}
    store.write(CURRENT.progress_key(running), json.dumps(beat).encode())
    assert collect(store, GcOptions(keep_days=50))["deleted"]["runs"]["files"] == 0
    dry = collect(store, GcOptions(dry_run=True))
    assert "3 parts of old run logs and reports" in "\n".join(gc_lines(dry))
    stored = [{"record": f"r{n}", "files": 1, "snapshots": [1]} for n in range(7)]
    assert "  takedowns … and 2 more" in gc_lines({**dry, "takedowns": {**dry["takedowns"], "stored": stored}})
    left = {notes, *keys[running], *keys[young]}
    assert set(store.keys("_runs/")) == left | set(keys[old])
    assert collect(store)["deleted"]["runs"] == {"files": 3, "bytes": 9}
    assert set(store.keys("_runs/")) == left
    aged(store, 3, keys[young])
    assert collect(store, GcOptions(forget=True))["deleted"]["runs"]["files"] == 0, "nothing is taken down"
    record_takedown(store, "asked", sources=["s3://corpus/c.tar"])
    assert collect(store)["deleted"]["runs"]["files"] == 0
    assert collect(store, GcOptions(forget=True))["deleted"]["runs"]["files"] == 3
    assert set(store.keys("_runs/")) == {notes, *keys[running]}


def rows_of(store: Store) -> list:
    from pipeline.loader import LatentDataset

    return list(LatentDataset.open(store.root).rows())


def test_compacted_files_replace_the_old_ones_and_take_the_bytes_of_a_takedown_along(
    store: Store, tmp_path: Path
) -> None:
    receipt, uris = two_buckets(store, tmp_path)
    publish_all(store)
    everything = shown(store)
    first = record_takedown(store, "asked", sources=[uris[0]])
    publish_all(store)
    assert compact(store).snapshot is not None
    assert undo(store, uris[0], reason="", by="")["undone"] == [first.key]
    publish_all(store)
    assert shown(store) == everything, "until gc deletes the file that has the row"
    record_takedown(store, "asked", sources=[uris[0]])
    publish_all(store)
    aged(store)
    left = shown(store)
    found = collect(store, NEWEST)
    assert found["deleted"]["compacted"]["files"] >= 2
    assert not {receipt.files[0].key, receipt.files[0].index_key} & stored(store)
    named = re.findall(rb"data/\S+\.parquet", store.read(".huggingface.yaml"))
    assert named
    assert {key.decode() for key in named} <= stored(store), "`datasets` would miss a file"
    assert shown(store) == left == everything - {"video00040-0000"}
    assert verify_output(store).problems == []
    with pytest.raises(OutputError, match="cannot be undone"):
        undo(store, uris[0], reason="", by="")
    # What a later takedown hides is in a compacted file now, and may be undone.
    later = record_takedown(store, "asked", sources=[uris[1]])
    publish_all(store)
    assert undo(store, uris[1], reason="", by="")["undone"] == [later.key]
    publish_all(store)
    assert shown(store) == left
    collect(store, NEWEST)
    assert shown(store) == left


def test_a_receipt_whose_rows_were_compacted_and_then_replaced_retires_too(store: Store, tmp_path: Path) -> None:
    """Its own files are long gone. It must not stand for the version if the input goes back to it."""
    assert compact(store).snapshot is not None
    aged(store)
    collect(store, NEWEST)
    old = receipt_for(store, "a")
    assert not files_of(old) & stored(store)
    write_version(store, tmp_path, "a", "e2", (2,))
    publish_all(store)
    compact(store)
    aged(store)
    assert collect(store, NEWEST)["receipts"]["retired"] == 1
    assert Ledger(store).read(old.shard_id) is None
    write_version(store, tmp_path, "a", "e1", (0, 1), attempt="a9")
    publish_all(store, listing=[old.shard.objects[0]])
    assert {"video00000-0000", "video00001-0000"} <= shown(store)
    assert "video00002-0000" not in shown(store)
    assert verify_output(store).problems == []


@pytest.mark.parametrize("late", [False, True], ids=["before gc", "after gc"])
def test_a_version_that_an_unchanged_input_stands_for_is_kept_or_comes_back(store: Store, late: bool) -> None:
    """A build found that the input has the bytes of its first version again; its receipt names that version and has no files."""
    old = receipt_for(store, "b")
    shard = tar("b", "e3")
    same = replace(
        old,
        shard=shard,
        shard_id=shard.id(FINGERPRINT),
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        files=(),
        counts=Counts(),
        stats=None,
        same_as={shard.objects[0].uri: old.shard_id},
    )
    if late:
        assert collect(store, NEWEST)["receipts"]["retired"] == 1
    Ledger(store).commit(same)
    found = collect(store, NEWEST)
    assert found["receipts"] == {"retired": 0, "restored": int(late)}
    assert files_of(old) <= stored(store)
    publish_all(store)
    assert {"video00010-0000", "video00011-0000"} <= shown(store)
    assert "video00012-0000" not in shown(store)


def test_each_takedown_is_judged_by_its_own_rows_and_the_output_is_read_once_for_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To list 100,000 receipts and to read all tables for every record took hours on an object store."""
    now = GcOptions(grace_s=0.0, keep_snapshots=1, keep_days=0)
    asked: list[str] = []
    for name in ("list", "read"):
        call = getattr(store, name)
        monkeypatch.setattr(store, name, lambda key="", call=call, **how: (asked.append(key), call(key, **how))[1])

    def dry_run() -> tuple[dict, int]:
        publish_all(store)
        asked.clear()
        found = collect(store, replace(now, dry_run=True))["takedowns"]
        return found, asked.count("_receipts/")

    records = [str(take_down(store, ["a/0"], reason="asked", by="ann")["record"])]
    in_first = {"record": records[0], "files": 1, "snapshots": [4]}
    assert dry_run()[0] == {"names_removed": [], "stored": [in_first]}
    records += [str(take_down(store, [name], reason="asked", by="ann")["record"]) for name in ("b/12", "c/20")]
    found, calls = dry_run()
    in_second = {"record": records[1], "files": 1, "snapshots": [5]}
    assert found == {"names_removed": [records[2]], "stored": [{**in_first, "snapshots": [5]}, in_second]}
    for _ in range(3):
        record_takedown(store, "asked", samples=[("s3://corpus/b.tar", "b/13")])
    assert dry_run()[1] == calls

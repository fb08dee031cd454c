"""Delta log of a published output: read by deltalake, polars and Ray, and compared with the snapshots it is a view of."""

import json
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from pipeline import encode
from pipeline.config import StorageConfig
from pipeline.errors import OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate import delta_log
from pipeline.operate.delta_log import LOG, DeltaLog
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage import open_store
from tests.pipeline.frameless_build import make_workspace
from tests.pipeline.published import publish_all, shown_ids
from tests.tiny_corpus import make_corpus, tiny_job, video_bytes, write_tar


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An output with three snapshots: two shards; one more and one replaced; the same corpus with another fingerprint as well."""
    folder = tmp_path_factory.mktemp("delta")
    corpus = make_corpus(folder / "in", shards=2, samples=3)
    store = open_store(str(folder / "out"), StorageConfig())

    def build(**flags):
        encode(tiny_job(corpus, folder / "out", **flags))
        return publish(store, PublishOptions()).snapshot

    build()
    write_tar(corpus / "000000.tar", {"new": {"mp4": video_bytes(17, seed=50)}})
    write_tar(corpus / "000002.tar", {"more": {"mp4": video_bytes(9, seed=51)}})
    build()
    build(**{"write.moments": True})
    assert DeltaLog(store).sync().version == 3
    return folder / "out"


@pytest.fixture
def output(published, tmp_path):
    """A copy that a test may change: (store, URI of the table)."""
    shutil.copytree(published, tmp_path / "out")
    return open_store(str(tmp_path / "out"), StorageConfig()), str(tmp_path / "out" / "data")


def stored(store, number):
    """id -> (latent bytes, log-variance bytes or None, caption) of a snapshot, read from its files."""
    found = {}
    for row in Snapshots(store).table(Snapshots(store).read(number), "files").to_pylist():
        for item in pq.read_table(store.uri(row["key"])).to_pylist():
            found[item["id"]] = item["vae_latent_bytes"], item.get("vae_logvar_bytes"), item["caption"]
    assert sorted(found) == shown_ids(store, Snapshots(store).read(number))
    return found


def as_rows(items):
    return {item["id"]: (item["vae_latent_bytes"], item["vae_logvar_bytes"], item["caption"]) for item in items}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_version_reads_as_its_snapshot(output, number):
    store, table = output
    expected = stored(store, number)
    assert as_rows(DeltaTable(table, version=number).to_pyarrow_table().to_pylist()) == expected
    assert as_rows(pl.scan_delta(table, version=number).collect().to_dicts()) == expected


def test_the_newest_version_is_the_newest_snapshot_and_version_zero_is_empty(output):
    store, table = output
    assert DeltaTable(table).version() == 3 == Snapshots(store).numbers()[-1]
    assert DeltaTable(table, version=0).to_pyarrow_table().num_rows == 0
    newest = DeltaTable(table).history(1)[0]
    assert (newest["snapshot"], newest["fingerprints"]) == (3, sorted(Snapshots(store).read(3).fingerprints))


@pytest.mark.ray
def test_ray_data_reads_a_version(output):
    import ray

    store, table = output
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", object_store_memory=80 << 20)
    try:
        assert as_rows(ray.data.read_delta(table, version=2).take_all()) == stored(store, 2)
    finally:
        ray.shutdown()


def test_statistics_bound_the_values_and_prune_files(output):
    store, table = output
    adds = DeltaTable(table).get_add_actions(flatten=True)
    bounds = {path: n for n, path in enumerate(adds["path"].to_pylist())}
    columns = {name: adds[name].to_pylist() for name in adds.schema.names}
    for row in Snapshots(store).table(Snapshots(store).read(3), "files").to_pylist():
        at = bounds[row["key"].removeprefix("data/")]
        values = pq.read_table(store.uri(row["key"])).select(["id", "bucket", "fps", "num_frames"]).to_pydict()
        assert columns["num_records"][at] == row["rows"]
        for name, found in values.items():
            assert columns[f"min.{name}"][at] <= min(found)
            assert columns[f"max.{name}"][at] >= max(found)
            assert columns[f"null_count.{name}"][at] == 0
    chosen = sorted(stored(store, 3))[0]
    assert [row["id"] for row in pl.scan_delta(table).filter(pl.col("id") == chosen).collect().to_dicts()] == [chosen]


def test_foreign_maintenance_deletes_and_rewrites_nothing(output):
    store, table = output
    before = {info.key: info.size for info in store.list("")}
    assert DeltaTable(table).vacuum(dry_run=False) == []
    for change in (lambda t: t.optimize.compact(), lambda t: t.delete("num_frames > 0")):
        with pytest.raises(DeltaError, match="lathe-view"):
            change(DeltaTable(table))
    assert {info.key: info.size for info in store.list("")} == before


@pytest.mark.parametrize("name", ["00000000000000000004.json", "00000000000000000003.00.crc", "x.parquet"])
def test_a_foreign_commit_is_named_and_nothing_is_written(output, name):
    store, _ = output
    store.write(LOG + name, b'{"commitInfo":{"operation":"WRITE","engineInfo":"delta-rs:1"}}\n')
    with pytest.raises(OutputError, match=rf"{name} was not written by Lathe.*--no-delta"):
        DeltaLog(store).sync()


def test_a_log_that_cannot_be_written_leaves_the_snapshot_and_says_so(output, monkeypatch):
    store, _ = output
    record_takedown(store, "x", ids=[sorted(stored(store, 3))[0]])

    def fail(self):
        raise OutputError("no space")

    monkeypatch.setattr(DeltaLog, "sync", fail)
    with pytest.raises(OutputError, match="snapshot 4 is published, but its Delta view was not written: no space"):
        publish(store, PublishOptions())
    assert Snapshots(store).numbers() == [1, 2, 3, 4]


def test_a_table_of_somebody_else_in_its_place_is_refused(output):
    store, table = output
    shutil.rmtree(f"{table}/_delta_log")
    write_deltalake(f"{table}/x", pl.DataFrame({"a": [1]}).to_arrow())
    shutil.move(f"{table}/x/_delta_log", f"{table}/_delta_log")
    with pytest.raises(OutputError, match="was not written by Lathe"):
        DeltaLog(store).sync()


@pytest.mark.parametrize("lost", [(3,), (2, 3), (0, 1, 2, 3), (0,), (1,)])
def test_a_log_that_a_kill_left_half_written_is_completed_to_the_same_bytes(output, lost):
    store, _ = output
    before = {info.key: store.read(info.key) for info in store.list(LOG)}
    for version in lost:
        store.delete(f"{LOG}{version:020}.json")
    assert DeltaLog(store).sync().version == 3
    assert {info.key: store.read(info.key) for info in store.list(LOG)} == before
    DeltaLog(store).sync()
    assert {info.key: store.read(info.key) for info in store.list(LOG)} == before


def test_a_takedown_leaves_no_version_that_names_the_bytes(output):
    store, table = output
    victim = sorted(stored(store, 1))[0]
    holding = [
        row["key"].removeprefix("data/")
        for number in (1, 2, 3)
        for row in Snapshots(store).table(Snapshots(store).read(number), "files").to_pylist()
        if victim in pq.read_table(store.uri(row["key"]), columns=["id"])["id"].to_pylist()
    ]
    record_takedown(store, "asked for", ids=[victim])
    view = DeltaLog(store).sync()
    for info in store.list(LOG):
        assert not any(path.encode() in store.read(info.key) for path in holding)
    for version in (1, 2, 3):
        ids = set(DeltaTable(table, version=version).to_pyarrow_table(columns=["id"])["id"].to_pylist())
        assert victim not in ids
        assert ids <= set(stored_ids(store, version))
    assert view.left_out_files >= 0
    assert DeltaLog(store).sync() == view


def stored_ids(store, number):
    return shown_ids(store, Snapshots(store).read(number))


def test_a_file_with_rows_that_do_not_count_is_left_out_and_said(tmp_path):
    workspace = make_workspace(tmp_path)
    workspace.run("abc").finish()
    publish_all(workspace.store)
    assert DeltaLog(workspace.store).sync().notice() is None
    record_takedown(workspace.store, "x", sources=[str(workspace.folder / "b.mp4")])
    assert publish_all(workspace.store).number == 2
    view = DeltaLog(workspace.store).sync()
    assert view.notice() == (
        "the Delta view of snapshot 2 lacks 2 rows of 1 files, which also hold rows that do not count"
    )
    assert DeltaTable(str(tmp_path / "out" / "data")).file_uris() == []


def test_an_output_of_tars_or_without_snapshots_has_no_log(tmp_path):
    corpus = make_corpus(tmp_path / "in", shards=1, samples=2)
    encode(tiny_job(corpus, tmp_path / "out", **{"write.format": "tar"}))
    store = open_store(str(tmp_path / "out"), StorageConfig())
    assert DeltaLog(store).sync() is None
    publish(store, PublishOptions())
    assert DeltaLog(store).sync() is None
    assert list(store.list(LOG)) == []


def test_many_files_have_their_statistics_in_a_checkpoint(output, monkeypatch):
    store, table = output
    expected = {number: stored(store, number) for number in (1, 2, 3)}
    for info in list(store.list(LOG)):
        store.delete(info.key)
    monkeypatch.setattr(delta_log, "MANY", 1)
    DeltaLog(store).sync()
    assert any(info.key.endswith(".checkpoint.parquet") for info in store.list(LOG))
    assert b"minValues" not in store.read(f"{LOG}{1:020}.json")
    for number, rows in expected.items():
        assert as_rows(DeltaTable(table, version=number).to_pyarrow_table().to_pylist()) == rows
        assert as_rows(pl.scan_delta(table, version=number).collect().to_dicts()) == rows
    assert "min.id" in DeltaTable(table).get_add_actions(flatten=True).schema.names
    last = json.loads(store.read(LOG + delta_log.LAST_CHECKPOINT))
    assert last["version"] in expected
    record_takedown(store, "x", ids=[sorted(expected[3])[0]])
    DeltaLog(store).sync()
    assert DeltaTable(table).version() == 3


def test_the_log_reads_nothing_of_receipts(output):
    """The log lies below `data/`: a foreign tool that is pointed at it cannot reach what is beside."""
    store, table = output
    assert all(info.key.startswith("data/") for info in store.list(LOG))
    assert Ledger(store).latent_set()
    assert (
        DeltaTable(table).vacuum(dry_run=True, full=True, retention_hours=0, enforce_retention_duration=False)
        is not None
    )

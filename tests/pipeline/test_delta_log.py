"""Delta log of a published output: read by deltalake, polars and Ray, and compared with the snapshots it is a view of."""

import json
import shutil
from dataclasses import replace

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from pipeline.cli import output_commands
from pipeline.config import WriteConfig
from pipeline.errors import OutputError, PublishFailed
from pipeline.format.layout import DELTA_LOG
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Check, Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset
from pipeline.operate import delta_writing
from pipeline.operate.delta_contents import LAST_CHECKPOINT, version_key
from pipeline.operate.delta_log import DeltaLog, DeltaView
from pipeline.operate.publish import PublishOptions, publish
from pipeline.records import Shard, SourceObject
from tests.loader.document import blocks
from tests.pipeline.frameless_build import make_workspace
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all, shown_ids

FILMS = [f"s3://corpus/shard-{number:03d}.tar" for number in range(3)]


def commit(store, folder, number, seeds, attempt="a1", etag=None, fingerprint=None, **config):
    """Commits a shard of one clip per seed, named by its number; with `etag` a new version of its tar."""
    config = WriteConfig(**config)
    uri = FILMS[number]
    clips = [latent_clip(seed, uri=uri, dtype=config.dtype, moments=config.moments) for seed in seeds]
    made = write_shard(store, folder / "spool", config, clips, shard=number, attempt=attempt)
    shard = Shard("tar", made.shard.name, (SourceObject(uri, 1000, etag or f"e{number}"),))
    fingerprint = fingerprint or made.fingerprint
    return Ledger(store).commit(replace(made, shard=shard, shard_id=shard.id(fingerprint), fingerprint=fingerprint))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An output with three snapshots: two shards; one more and one replaced; another fingerprint with moments as well."""
    folder = tmp_path_factory.mktemp("delta")
    store = local_store(folder / "out")
    for number in range(2):
        commit(store, folder, number, range(10 * number, 10 * number + 3))
    publish_all(store)
    commit(store, folder, 0, [50], attempt="a2", etag="new")
    commit(store, folder, 2, [60])
    publish_all(store)
    commit(store, folder, 1, range(70, 73), attempt="a3", fingerprint="ab" * 16, moments=True)
    publish_all(store)
    assert DeltaLog(store).sync().version == 3
    return folder / "out"


@pytest.fixture
def output(published, tmp_path):
    """A copy that a test may change: (store, URI of the table)."""
    shutil.copytree(published, tmp_path / "out")
    return local_store(tmp_path / "out"), str(tmp_path / "out" / "data")


def log_of(store):
    return {info.key: store.read(info.key) for info in store.list(DELTA_LOG)}


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
        gone = shown_ids(store, Snapshots(store).read(2))[0]
        record_takedown(store, "asked", ids=[gone])
        snapshot = LatentDataset.open(f"{store.root}@2")  # docs/loader.md, here because Ray runs
        scope = {"files": snapshot.file_uris(), "hidden": snapshot.hidden_rows()}
        exec(next(block for block in blocks("ray.data") if "read_parquet" in block), scope)
        assert sorted(scope["ids"]) == shown_ids(store, Snapshots(store).read(2))
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


FOREIGN = b'{"commitInfo":{"operation":"WRITE","engineInfo":"delta-rs:1"}}\n'


def replace_version(number):
    return lambda store, table: store.write(version_key(number), FOREIGN)


def add_to_version(store, table):
    store.write(version_key(2), store.read(version_key(2)) + b'{"txn":{}}\n')


def make_checkpoint(store, table):
    DeltaTable(table).create_checkpoint()


def make_old_checkpoint(store, table):
    DeltaTable(table, version=1).create_checkpoint()
    store.delete(DELTA_LOG + LAST_CHECKPOINT)


def point_to_a_checkpoint(store, table):
    store.write(DELTA_LOG + LAST_CHECKPOINT, b'{"version":2,"size":5}')


def name_of(name):
    return lambda store, table: store.write(DELTA_LOG + name, b"x")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replace_version(4), "00000000000000000004.json"),
        (replace_version(3), "00000000000000000003.json"),
        (replace_version(1), "00000000000000000001.json"),
        (replace_version(0), "00000000000000000000.json"),
        (add_to_version, "00000000000000000002.json"),
        (make_checkpoint, "00000000000000000003.checkpoint.parquet"),
        (make_old_checkpoint, "00000000000000000001.checkpoint.parquet"),
        (point_to_a_checkpoint, LAST_CHECKPOINT),
        (name_of("00000000000000000003.00.crc"), "00000000000000000003.00.crc"),
        (name_of("00000000000000000002.checkpoint.parquet"), "00000000000000000002.checkpoint.parquet"),
        (name_of("x.parquet"), "x.parquet"),
    ],
)
def test_what_another_program_wrote_is_named_and_nothing_is_written(output, change, name):
    store, table = output
    change(store, table)
    before = log_of(store)
    for act in (DeltaLog(store).check, DeltaLog(store).sync, lambda: publish(store, PublishOptions())):
        with pytest.raises(
            OutputError, match=rf"_delta_log/{name} was not written by Lathe.* delete .*_delta_log.*--no-delta"
        ):
            act()
    assert log_of(store) == before


def test_a_foreign_log_is_rebuilt_after_it_was_deleted(output):
    store, table = output
    before = log_of(store)
    make_checkpoint(store, table)
    shutil.rmtree(store.uri(DELTA_LOG))
    assert publish(store, PublishOptions()).delta == DeltaView(3)
    assert log_of(store) == before


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
    before = log_of(store)
    for version in lost:
        store.delete(version_key(version))
    assert DeltaLog(store).sync() == DeltaView(3)
    assert log_of(store) == before
    stamps = {info.key: info.etag for info in store.list(DELTA_LOG)}
    DeltaLog(store).sync()
    assert {info.key: info.etag for info in store.list(DELTA_LOG)} == stamps, "nothing is written again"


def test_a_takedown_leaves_no_version_that_names_the_bytes(output):
    store, table = output
    victim = sorted(stored(store, 3))[0]
    holding = [
        row["key"].removeprefix("data/")
        for number in (1, 2, 3)
        for row in Snapshots(store).table(Snapshots(store).read(number), "files").to_pylist()
        if victim in pq.read_table(store.uri(row["key"]), columns=["id"])["id"].to_pylist()
    ]
    record_takedown(store, "asked for", ids=[victim])
    view = DeltaLog(store).sync()
    for info in store.list(DELTA_LOG):
        assert not any(path.encode() in store.read(info.key) for path in holding)
    for version in (1, 2, 3):
        ids = set(DeltaTable(table, version=version).to_pyarrow_table(columns=["id"])["id"].to_pylist())
        assert victim not in ids
        assert ids <= set(stored_ids(store, version))
    assert view == DeltaView(3, hidden_files=1, hidden_rows=3)
    assert DeltaLog(store).sync() == view


def test_a_takedown_reaches_the_view_also_if_nothing_is_published(output):
    store, table = output
    victim = sorted(stored(store, 3))[0]
    record_takedown(store, "asked for", ids=[victim])
    with pytest.raises(PublishFailed, match="canary: not today"):
        publish(store, PublishOptions(), canary=lambda *_: Check("canary", ok=False, message="not today"))
    assert Snapshots(store).numbers() == [1, 2, 3]
    for version in (1, 2, 3):
        assert victim not in DeltaTable(table, version=version).to_pyarrow_table(columns=["id"])["id"].to_pylist()


def stored_ids(store, number):
    return shown_ids(store, Snapshots(store).read(number))


def test_a_file_with_rows_that_do_not_count_is_left_out_and_said(tmp_path):
    workspace = make_workspace(tmp_path)
    workspace.run("abc").finish()
    publish_all(workspace.store)
    assert DeltaLog(workspace.store).sync().notices() == []
    record_takedown(workspace.store, "x", sources=[str(workspace.folder / "b.mp4")])
    assert publish_all(workspace.store).number == 2
    view = DeltaLog(workspace.store).sync()
    assert view.notices() == ["the Delta view of snapshot 2 lacks 2 rows of 1 file with rows that do not count"]
    assert DeltaTable(str(tmp_path / "out" / "data")).file_uris() == []


def test_an_output_of_tars_or_without_snapshots_has_no_log(tmp_path):
    store = local_store(tmp_path / "out")
    commit(store, tmp_path, 0, [1, 2], format="tar")
    assert DeltaLog(store).sync() is None
    publish_all(store)
    assert DeltaLog(store).sync() is None
    assert list(store.list(DELTA_LOG)) == []


def test_tars_that_the_view_lacks_are_said(tmp_path, capsys):
    store, table = local_store(tmp_path / "out"), tmp_path / "out" / "data"
    commit(store, tmp_path, 0, [1, 2], format="tar")
    publish_all(store)
    commit(store, tmp_path, 1, [3])
    commit(store, tmp_path, 2, [4, 5, 6], format="tar")
    text = "the Delta view of snapshot 2 lacks 5 rows of 2 tar files: a Delta table holds only Parquet"
    published = publish(store, PublishOptions())
    output_commands.show_published(published, False)
    assert f"  note      {text}" in capsys.readouterr().out.splitlines()
    output_commands.show_published(published, True)
    found = json.loads(capsys.readouterr().out)
    left_out = {"tar_files": 2, "tar_rows": 5}
    assert found["delta"] == {"version": 2, "hidden_files": 0, "hidden_rows": 0, **left_out}
    assert text in found["notices"]
    assert DeltaTable(str(table)).history(1)[0]["leftOut"] == left_out
    assert DeltaTable(str(table)).to_pyarrow_table().num_rows == 1
    commit(store, tmp_path, 1, [7], attempt="a2", etag="new", format="tar")
    publish_all(store)
    assert DeltaLog(store).sync() == DeltaView(3, tar_files=3, tar_rows=6)
    assert DeltaTable(str(table)).to_pyarrow_table().num_rows == 0


def test_no_delta_writes_nothing_and_a_later_publish_brings_the_view_up(tmp_path):
    store = local_store(tmp_path / "out")
    commit(store, tmp_path, 0, [1])
    found = publish(store, PublishOptions(delta=False)) if Ledger(store).prepare("films") == [] else None
    assert (found.snapshot.number, found.delta, log_of(store)) == (1, None, {})
    again = publish(store, PublishOptions())
    assert (again.made, again.delta) == (False, DeltaView(1))
    commit(store, tmp_path, 1, [2])
    assert publish(store, PublishOptions(delta=False)).snapshot.number == 2
    commit(store, tmp_path, 2, [3])
    assert publish(store, PublishOptions()).delta == DeltaView(3)
    for number in (1, 2, 3):
        table = DeltaTable(store.uri("data"), version=number).to_pyarrow_table(columns=["id"])
        assert sorted(table["id"].to_pylist()) == stored_ids(store, number)


def test_many_files_have_their_statistics_in_a_checkpoint(output, monkeypatch):
    store, table = output
    expected = {number: stored(store, number) for number in (1, 2, 3)}
    for info in list(store.list(DELTA_LOG)):
        store.delete(info.key)
    monkeypatch.setattr(delta_writing, "MANY", 1)
    DeltaLog(store).sync()
    assert any(info.key.endswith(".checkpoint.parquet") for info in store.list(DELTA_LOG))
    assert b"minValues" not in store.read(version_key(1))
    for number, rows in expected.items():
        assert as_rows(DeltaTable(table, version=number).to_pyarrow_table().to_pylist()) == rows
        assert as_rows(pl.scan_delta(table, version=number).collect().to_dicts()) == rows
    assert "min.id" in DeltaTable(table).get_add_actions(flatten=True).schema.names
    last = json.loads(store.read(DELTA_LOG + LAST_CHECKPOINT))
    assert last["version"] in expected
    record_takedown(store, "x", ids=[sorted(expected[3])[0]])
    DeltaLog(store).sync()
    assert DeltaTable(table).version() == 3


def test_the_log_reads_nothing_of_receipts(output):
    """The log lies below `data/`: a foreign tool that is pointed at it cannot reach what is beside."""
    store, table = output
    assert all(info.key.startswith("data/") for info in store.list(DELTA_LOG))
    assert Ledger(store).latent_set()
    assert (
        DeltaTable(table).vacuum(dry_run=True, full=True, retention_hours=0, enforce_retention_duration=False)
        is not None
    )

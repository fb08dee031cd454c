"""Delta log over the history of an output: columns that come later, snapshots that `lathe gc` deleted between others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipeline.config import WriteConfig
from pipeline.format.layout import DELTA_LOG, snapshot_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate import delta_writing
from pipeline.operate.delta_contents import version_key
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.gc import collect
from pipeline.operate.verify import verify_output
from pipeline.records import MemberRule
from pipeline.storage import Store
from tests.operate.outputs import NEWEST, aged
from tests.pipeline.latent_clips import PARTS, latent_clip, local_store, write_shard
from tests.pipeline.published import add_shards, publish_all


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def add_paired(store: Store, folder: Path, number: int, fingerprint: str, name: str) -> None:
    """Commits a shard of one clip with a paired video `name`."""
    clip = latent_clip(number)
    clips = [replace(clip, members={name: clip.latent_CTHW})]
    made = write_shard(store, folder / "spool", WriteConfig(), clips, shard=number, members=(name,))
    parts = PARTS | {"members": MemberRule(((name, f"{name}.mp4"),)).to_dict()}
    named = {"fingerprint": fingerprint, "shard_id": made.shard.id(fingerprint), "fingerprint_parts": parts}
    Ledger(store).commit(replace(made, **named))


def columns(store: Store, version: int | None = None) -> set[str]:
    fields = DeltaTable(store.uri("data"), version=version).schema().fields
    return {field.name for field in fields if field.name.endswith("_bytes")} - {"i2v_cond_bytes", "vae_logvar_bytes"}


def log_of(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.keys(DELTA_LOG)}


@pytest.mark.parametrize("many", [0, 2000])
def test_columns_of_paired_videos_are_in_the_view_from_the_snapshot_that_has_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """`many`: 0 has every version in a checkpoint as well."""
    monkeypatch.setattr(delta_writing, "MANY", many)
    add_shards(store, tmp_path, range(1))
    publish_all(store)
    add_paired(store, tmp_path, 11, "ab" * 16, "control")
    publish_all(store)
    add_paired(store, tmp_path, 12, "cd" * 16, "depth")
    publish_all(store)
    publish_all(store, fingerprint="f0e1d2c3")
    latent = "vae_latent_bytes"
    every = {latent, "control_bytes", "depth_bytes"}
    expected = {0: {latent}, 1: {latent}, 2: {latent, "control_bytes"}, 3: every, 4: every}
    assert {version: columns(store, version) for version in expected} == expected
    rows = polars.scan_delta(store.uri("data"), version=3).select("id", "control_bytes", "depth_bytes").collect()
    found = {row["id"]: (row["control_bytes"] is None, row["depth_bytes"] is None) for row in rows.to_dicts()}
    assert found == {
        "video00000-0000": (True, True),
        "video00001-0000": (True, True),
        "video00011-0000": (False, True),
        "video00012-0000": (True, False),
    }
    ids = {DeltaTable(store.uri("data"), version=version).metadata().id for version in expected}
    assert len(ids) == 1
    whole = log_of(store)
    for key in whole:
        store.delete(key)
    DeltaLog(store).sync()
    assert log_of(store) == whole, "written at once as one after the other"
    aged(store)
    collect(store, replace(NEWEST, keep_snapshots=2))
    assert {version: columns(store, version) for version in (3, 4)} == {3: every, 4: every}


def test_the_log_begins_after_snapshots_that_gc_deleted_between_others(store: Store, tmp_path: Path) -> None:
    """`lathe gc --forget` deletes those that name files with taken down rows, so that older ones may stay."""
    add_shards(store, tmp_path, range(1))
    publish_all(store)
    (gone,) = add_shards(store, tmp_path, range(1, 2))
    add_shards(store, tmp_path, range(2, 3))
    publish_all(store)
    record_takedown(store, "asked", sources=[gone.shard.objects[0].uri])
    publish_all(store)
    add_shards(store, tmp_path, range(3, 4))
    publish_all(store)
    aged(store)
    found = collect(store, replace(NEWEST, keep_snapshots=9, forget=True))
    assert found["snapshots"]["retained"] == [1, 3, 4]
    for version in (0, 1, 2):
        with pytest.raises(DeltaError):
            DeltaTable(store.uri("data"), version=version)
    numbers = {
        version: DeltaTable(store.uri("data"), version=version).to_pyarrow_table().num_rows for version in (3, 4)
    }
    assert numbers == {3: 4, 4: 6}
    before = log_of(store)
    assert DeltaLog(store).sync().version == 4
    assert log_of(store) == before
    assert verify_output(store).ok


def test_a_number_without_a_snapshot_is_no_gap(store: Store, tmp_path: Path) -> None:
    """A record of zero bytes is that of a killed publisher; its version changes nothing."""
    add_shards(store, tmp_path, range(1))
    publish_all(store)
    store.write(snapshot_key(2), b"")
    add_shards(store, tmp_path, range(1, 2))
    publish_all(store)
    assert [store.exists(version_key(version)) for version in range(4)] == [True] * 4
    table = DeltaTable(store.uri("data"), version=2).to_pyarrow_table()
    assert table.num_rows == 2

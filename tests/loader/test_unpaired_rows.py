"""`unpaired: encode`: rows with and without paired videos of one build, in files of their own; read, filtered, compacted, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deltalake import DeltaTable

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import BuildError, ConfigError
from pipeline.export.targets import Request, export_output
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.loader import LatentLoader
from pipeline.operate.compact import compact
from pipeline.operate.inspect import file_metadata
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.records import MemberRule
from pipeline.storage import open_store
from tests.export.test_export_tars import samples_of
from tests.loader.outputs import IMAGE, SHORT, WIDE, Output, clip_of
from tests.loader.test_loader_members import NAMES, paired, same
from tests.pipeline.latent_clips import PARTS, shard_writer, write_shard

HAVE, LACK = "control is not null", "control is null"
RULE = MemberRule(tuple((name, f"{name}.mp4") for name in NAMES), unpaired=True)
CONFIGS = {"parquet": WriteConfig(store=("first_frame",)), "tar": WriteConfig(format="tar", moments=True)}


def clip(seed, bucket, config):
    """Every third one is paired."""
    if seed % 3 == 0 and bucket != IMAGE:
        return paired(seed, bucket, config)
    return clip_of(seed, bucket, dtype=config.dtype, moments=config.moments, store=config.store)


@pytest.fixture(scope="module", params=CONFIGS)
def output(request, tmp_path_factory):
    """Three shards of videos in two buckets, a third of them paired, and of images."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    store, clips = open_store(str(folder / "out"), StorageConfig()), {}
    Ledger(store).prepare("films")
    for shard in range(3):
        made = [clip(100 * shard + n, (SHORT, WIDE, IMAGE)[n % 5 % 3], config) for n in range(12)]
        receipt = write_shard(store, folder / "spool", config, made, shard=shard, members=NAMES, unpaired=True)
        Ledger(store).commit(replace(receipt, fingerprint_parts=PARTS | {"members": RULE.to_dict()}))
        clips |= {item.id: item for item in made}
    publish(store, PublishOptions(delta=request.param == "parquet"))
    return Output(store, clips)


def ids(output, *, with_members):
    return {name for name, item in output.clips.items() if bool(item.members) is with_members}


def test_all_rows_are_read_together_where_no_paired_video_is_asked_for(output):
    dataset = LatentDataset.open(output.uri)
    assert {row.id for row in dataset} == set(output.clips)
    for batch in LatentLoader(dataset, batch=2, epochs=1):
        for tensor, name in zip(batch.latents, batch.ids, strict=True):
            assert same(tensor, output.clips[name].latent_CTHW, dataset.spec.dtype)


def test_rows_with_paired_videos_are_chosen_by_a_filter_that_reads_no_file(output, monkeypatch):
    monkeypatch.setattr("pipeline.loader.filter.read_columns", None)
    for where, wanted in ((HAVE, True), (LACK, False), (f"not ({LACK})", True), (f"{HAVE} and fps > 1", True)):
        found = LatentDataset.open(output.uri, where=where)
        assert {row.id for row in found} == ids(output, with_members=wanted), where
    both = LatentDataset.open(output.uri, where=f"{LACK} and num_frames > 1 or {HAVE}")
    assert {row.id for row in both} == {name for name, item in output.clips.items() if item.plan.bucket != IMAGE}


def test_batches_of_the_chosen_rows_have_their_paired_videos(output):
    dataset = LatentDataset.open(output.uri, columns=(*NAMES, "metadata"), where=HAVE)
    seen = set()
    for batch in LatentLoader(dataset, batch=2, epochs=1, drop_last=False):
        for i, name in enumerate(batch.ids):
            seen.add(name)
            for member in NAMES:
                assert same(batch.members[member][i], output.clips[name].members[member], dataset.spec.dtype)
    assert seen == ids(output, with_members=True)


def test_rows_without_a_paired_video_that_is_asked_for_are_an_error_that_names_the_filter(output):
    lacking, total = len(ids(output, with_members=False)), len(output.clips)
    with pytest.raises(ConfigError, match=f'{lacking} of {total} rows .* no control; .* where "control is not null"'):
        LatentDataset.open(output.uri, columns=("control",))
    with pytest.raises(ConfigError, match="control is a paired video; test it with `control is not null`"):
        LatentDataset.open(output.uri, where="control > 1")
    request = Request("wds", normalize="none", members=("latent=latent.pt", "mask=mask.npy"))
    folder = Path(output.uri).parent / "no"
    with pytest.raises(ConfigError, match="have no mask"):
        export_output(output.uri, str(folder), request)
    assert not folder.exists()  # the same folder takes the export with a filter


def test_an_export_of_the_chosen_rows_has_their_paired_videos(output, tmp_path):
    members = ("latent=latent.pt", "control=control.pt")
    export_output(output.uri, str(tmp_path / "x"), Request("wds", normalize="none", members=members, where=HAVE))
    found = {}
    for path in (tmp_path / "x").rglob("*.tar"):
        found |= samples_of(path)
    assert set(found) == ids(output, with_members=True)
    assert all("control.pt" in item for item in found.values())


def test_other_readers_find_columns_or_members_of_the_tar_where_rows_have_them(output, tmp_path):
    have, lack = (ids(output, with_members=each) for each in (True, False))
    files = LatentDataset.open(output.uri).file_uris()
    if files[0].endswith(".tar"):
        found = {name: item for path in files for name, item in samples_of(Path(path)).items()}
        assert {name for name, item in found.items() if "control.npy" in item and "mask.npy" in item} == have
        assert {name for name, item in found.items() if not {"control.npy", "mask.npy"} & set(item)} - {
            "__latentset__"
        } == lack
        return
    import datasets

    rows = list(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path)))
    assert {row["id"] for row in rows if row["control_bytes"] is not None} == have
    assert {row["id"] for row in rows if row["mask_dtype"] is None} == lack
    view = DeltaTable(f"{output.uri}/data").to_pyarrow_table(columns=["id", "control_bytes"]).to_pylist()
    assert {row["id"] for row in view if row["control_bytes"]} == have


def test_a_file_says_which_paired_videos_its_rows_are_without(output):
    for key in output.store.keys("data/"):
        if key.endswith((".parquet", ".tar")):
            about = file_metadata(output.store, key)["latent"]
            names = set(about.get("store", ())) & set(NAMES), set(about.get("without", ()))
            assert names in ((set(NAMES), set()), (set(), set(NAMES)))


def test_compaction_keeps_both_kinds_apart_and_every_byte_verifies(output):
    assert compact(output.store).snapshot is not None
    files = Snapshots(output.store).table(Snapshots(output.store).latest(), "files").to_pylist()
    kinds = sorted((file["bucket"], json.loads(file["ranges"])["control"][0]) for file in files)
    assert kinds == sorted({(f"v{item.plan.bucket}", bool(item.members)) for item in output.clips.values()})
    found = {row.id: row for row in LatentDataset.open(output.uri, where=HAVE, columns=NAMES)}
    assert found.keys() == ids(output, with_members=True)
    dtype = LatentDataset.open(output.uri).spec.dtype
    assert all(same(row.members["mask"], output.clips[name].members["mask"], dtype) for name, row in found.items())
    assert {row.id for row in LatentDataset.open(output.uri, where=LACK)} == ids(output, with_members=False)
    assert verify_output(output.store).ok


def test_a_clip_with_some_of_the_members_is_not_written(tmp_path):
    config, store = CONFIGS["parquet"], open_store(str(tmp_path / "out"), StorageConfig())
    half = paired(3, SHORT, config)
    half.members.pop("mask")
    with (
        pytest.raises(BuildError, match="the job stores latent, first_frame, control, mask"),
        shard_writer(store, tmp_path / "s", config, members=NAMES, unpaired=True) as writer,
    ):
        writer.add(half)


def test_an_old_output_whose_rows_all_have_members_takes_the_same_filters(tmp_path):
    store, config = open_store(str(tmp_path / "out"), StorageConfig()), CONFIGS["parquet"]
    Ledger(store).prepare("films")
    Ledger(store).commit(write_shard(store, tmp_path / "s", config, [paired(0, SHORT, config)], members=NAMES))
    publish(store, PublishOptions(delta=False))
    (row,) = LatentDataset.open(store.root, where=HAVE, columns=NAMES)
    assert isinstance(row.members["control"], torch.Tensor)
    with pytest.raises(ConfigError, match="matches no row"):
        LatentDataset.open(store.root, where=LACK)

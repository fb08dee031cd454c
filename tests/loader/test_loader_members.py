"""Paired videos in rows, batches, exports and compacted files: bytes that were written, masks with one channel and never normalised."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import BuildError, ConfigError
from pipeline.export.targets import Request, export_output
from pipeline.format.codec import INT8, decoded, encoded
from pipeline.ledger.receipts import Ledger
from pipeline.loader.crops import Prefix
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.loader import LatentLoader
from pipeline.loader.rules import Pack
from pipeline.operate.compact import compact
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests.export.test_export_tars import loaded, samples_of
from tests.loader.outputs import SHORT, WIDE, Output, clip_of
from tests.pipeline.latent_clips import bits_of, latent_values, shard_writer, values_of, write_shard

NAMES = ("control", "mask")
CONFIGS = {
    "parquet": WriteConfig(store=("first_frame", "i2v_cond")),
    "tar": WriteConfig(format="tar", dtype="bfloat16", moments=True),
    "compressed": WriteConfig(dtype="float16", compression="zstd"),
}


def paired(seed, bucket, config):
    clip = clip_of(seed, bucket, dtype=config.dtype, moments=config.moments, store=config.store)
    control = latent_values(seed + 30_000, clip.num_frames, bucket)
    mask = np.random.default_rng(seed).random((1, *control.shape[1:]), np.float32)
    members = {"control": bits_of(control, config.dtype), "mask": bits_of(mask, config.dtype)}
    return dataclasses.replace(clip, members=members)


@pytest.fixture(scope="module", params=CONFIGS)
def output(request, tmp_path_factory):
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    store = open_store(str(folder / "out"), StorageConfig())
    Ledger(store).prepare("films")
    clips = {}
    for shard in range(2):
        made = [paired(100 * shard + n, (SHORT, WIDE)[n % 2], config) for n in range(6)]
        Ledger(store).commit(write_shard(store, folder / "spool", config, made, shard=shard, members=NAMES))
        clips |= {clip.id: clip for clip in made}
    publish(store, PublishOptions(delta=False))
    return Output(store, clips)


def same(tensor, array, dtype):
    return np.array_equal(tensor.float().numpy(), values_of(array, dtype))


def test_rows_and_items_have_the_members_that_they_were_opened_with(output):
    dataset = LatentDataset.open(output.uri, columns=(*NAMES, "fps"))
    for row in dataset:
        assert row.columns == {"fps": 8.0}
        assert list(row.members) == list(NAMES)
        for name, tensor in row.members.items():
            assert same(tensor, output.clips[row.id].members[name], dataset.spec.dtype)
    item = dataset.as_map_dataset()[3]
    assert same(item["mask"], output.clips[item["id"]].members["mask"], dataset.spec.dtype)
    assert all(not row.members for row in LatentDataset.open(output.uri))
    with pytest.raises(ConfigError, match=r"no column depth; there are .*control, mask"):
        LatentDataset.open(output.uri, columns=("depth",))


def test_batches_normalise_latents_of_members_and_leave_masks(output):
    dataset = LatentDataset.open(output.uri, columns=NAMES)
    options = {"normalize": "model", "dtype": torch.float32, "crop": Prefix(2)}
    for batch in LatentLoader(dataset, batch=3, epochs=1, **options):
        clips = [output.clips[name] for name in batch.ids]
        control, mask = (
            torch.from_numpy(np.stack([values_of(clip.members[name][:, :2], dataset.spec.dtype) for clip in clips]))
            for name in NAMES
        )
        torch.testing.assert_close(batch.members["control"], (control - 0.1) * 0.5)
        assert torch.equal(batch.members["mask"], mask)
    batch = next(iter(LatentLoader(dataset, batch=Pack(60), epochs=1)))
    for name in NAMES:
        for tensor, row in zip(batch.members[name], batch.ids, strict=True):
            assert same(tensor, output.clips[row].members[name], dataset.spec.dtype)
    whole = next(iter(LatentLoader(dataset, batch=3, epochs=1)))
    assert whole.members["mask"].shape == (3, 1, *whole.latents.shape[2:])


def test_plain_tars_have_members_normalised_as_the_latent_and_masks_as_they_are(output, tmp_path):
    members = ("control=control.pt", "mask=mask.npy")
    request = Request("wds", normalize="model", members=members, dtype="float32")
    report = export_output(output.uri, str(tmp_path / "out"), request)
    assert report.rows == len(output.clips)
    assert not any("control" in notice for notice in report.notices)
    dtype, found = LatentDataset.open(output.uri).spec.dtype, {}
    for path in (tmp_path / "out").rglob("*.tar"):
        found |= samples_of(path)
    for name, clip in output.clips.items():
        control = torch.from_numpy(values_of(clip.members["control"], dtype))
        torch.testing.assert_close(loaded(found[name]["control.pt"]), (control - 0.1) * 0.5)
        np.testing.assert_array_equal(
            np.load(io.BytesIO(found[name]["mask.npy"])), values_of(clip.members["mask"], dtype)
        )


def test_an_export_names_paired_videos_that_it_leaves_out(output, tmp_path):
    request = Request("wds", normalize="none", members=("latent=latent.pt", "mask=mask.pt"))
    (notice,) = export_output(output.uri, str(tmp_path / "out"), request).notices
    assert notice == "without control: paired videos are exported by wds, with --member control=control.pt"
    with pytest.raises(ConfigError, match=r"--member: .*control, mask or text\.NAME as content, got 'depth=depth.pt'"):
        export_output(output.uri, str(tmp_path / "no"), Request("wds", normalize="none", members=("depth=depth.pt",)))


def test_compaction_copies_members_and_every_byte_verifies(output):
    before = {row.id: row.members for row in LatentDataset.open(output.uri, columns=NAMES)}
    assert compact(output.store).snapshot is not None
    after = {row.id: row.members for row in LatentDataset.open(output.uri, columns=NAMES)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name][each], after[name][each]) for name in before for each in NAMES)
    assert verify_output(output.store).ok


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_members_and_masks_as_int8_are_read_as_the_codec_defines_them(tmp_path, container):
    config = WriteConfig(format=container, dtype="int8", compression="zstd")
    store, clip = open_store(str(tmp_path / "out"), StorageConfig()), paired(1, SHORT, WriteConfig(dtype="float32"))
    Ledger(store).prepare("films")
    Ledger(store).commit(write_shard(store, tmp_path / "s", config, [clip], members=NAMES))
    publish(store, PublishOptions(delta=False))
    (row,) = LatentDataset.open(store.root, columns=NAMES)
    batch = next(iter(LatentLoader(LatentDataset.open(store.root, columns=NAMES), batch=1)))
    for name in NAMES:
        values = clip.members[name]
        wanted = decoded(encoded(values, INT8).data, INT8, values.shape).astype(np.float32)
        np.testing.assert_array_equal(row.members[name].float().numpy(), wanted)
        np.testing.assert_array_equal(batch.members[name][0].float().numpy(), wanted)
        np.testing.assert_allclose(wanted, values, atol=np.ptp(values) / 200)
    assert verify_output(store).ok


def test_a_clip_without_its_members_is_not_written(tmp_path):
    config = CONFIGS["parquet"]
    with (
        pytest.raises(BuildError, match="the job stores latent, i2v_cond, first_frame, control, mask"),
        shard_writer(
            open_store(str(tmp_path / "out"), StorageConfig()), tmp_path / "s", config, members=NAMES
        ) as writer,
    ):
        writer.add(clip_of(1, SHORT, dtype=config.dtype, store=config.store))

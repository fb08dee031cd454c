"""Conditions and first frames in rows and batches: bytes that were written, values as those of latents, damage, refusals."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from pipeline.config import WriteConfig
from pipeline.errors import ConfigError, InputError
from pipeline.format.index import read_index
from pipeline.loader.crops import Prefix, Window
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.loader import LatentLoader
from pipeline.loader.rules import Pack
from tests.loader.outputs import mixed_shards, write_output
from tests.pipeline.latent_clips import local_store, values_of

BOTH = ("first_frame", "i2v_cond")
CONFIGS = {
    "parquet": WriteConfig(store=BOTH),
    "tar": WriteConfig(format="tar", dtype="bfloat16", moments=True, store=BOTH),
}


@pytest.fixture(scope="module", params=CONFIGS)
def output(request, tmp_path_factory):
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shards = mixed_shards(dtype=config.dtype, moments=config.moments, store=BOTH)
    return write_output(folder / "out", folder / "spool", shards, config)


def same_values(tensor, array, dtype):
    return np.array_equal(tensor.float().numpy(), values_of(array, dtype))


def test_rows_have_what_the_dataset_was_opened_with(output):
    plain, columns = LatentDataset.open(output.uri), (*BOTH, "fps")
    dataset = LatentDataset.open(output.uri, columns=columns)
    moments = ("logvar",) if dataset.spec.moments else ()
    assert dataset.spec.stored == ("latent", *moments, "i2v_cond", "first_frame")
    for row, bare in zip(dataset, plain, strict=True):
        clip = output.clips[row.id]
        assert row.columns == {"fps": 8.0, "first_frame": clip.first_frame}
        assert same_values(row.i2v_cond, clip.cond_CTHW, dataset.spec.dtype)
        assert torch.equal(row.latent, bare.latent)
        assert (bare.i2v_cond, bare.columns) == (None, {})
    assert [row.columns for row in dataset.rows(tensors=False)] == [{"fps": 8.0}] * 45
    item = dataset.as_map_dataset()[7]
    assert same_values(item["i2v_cond"], output.clips[item["id"]].cond_CTHW, dataset.spec.dtype)
    assert item["first_frame"] == output.clips[item["id"]].first_frame


def test_batches_have_the_condition_beside_the_latent(output):
    dataset = LatentDataset.open(output.uri, columns=(*BOTH, "width"))
    options = {"posterior": "sample"} if dataset.spec.moments else {}
    for batch in LatentLoader(dataset, batch=3, epochs=1, **options):
        assert batch.i2v_cond.shape == batch.latents.shape
        for i, name in enumerate(batch.ids):
            clip = output.clips[name]
            assert same_values(batch.i2v_cond[i], clip.cond_CTHW, dataset.spec.dtype), "never a sample"
            assert batch.columns["first_frame"][i] == clip.first_frame
            assert batch.columns["width"][i] == clip.plan.bucket.width
    (batch, *_) = LatentLoader(dataset, batch=3, epochs=1, normalize="model", dtype=torch.float32, crop=Prefix(2))
    wanted = [values_of(output.clips[name].cond_CTHW[:, :2], dataset.spec.dtype) for name in batch.ids]
    torch.testing.assert_close(batch.i2v_cond, (torch.from_numpy(np.stack(wanted)) - 0.1) * 0.5)


def test_packed_batches_have_a_condition_and_a_first_frame_for_each_latent(output):
    dataset = LatentDataset.open(output.uri, columns=BOTH)
    batch = next(iter(LatentLoader(dataset, batch=Pack(60), epochs=1)))
    assert len(batch.i2v_cond) == len(batch.columns["first_frame"]) == len(batch.ids) > 1
    for cond, image, name in zip(batch.i2v_cond, batch.columns["first_frame"], batch.ids, strict=True):
        assert same_values(cond, output.clips[name].cond_CTHW, dataset.spec.dtype)
        assert image == output.clips[name].first_frame


def test_only_what_is_asked_for_is_read(output):
    wanted = {(): 0, ("i2v_cond",): 1}
    for columns, more in wanted.items():
        loader = LatentLoader(LatentDataset.open(output.uri, columns=columns), batch=3, epochs=1)
        assert all((batch.i2v_cond is None) == (not columns) for batch in loader)
        stats = loader.stats()
        assert stats["tensors"] == 45 * (1 + more)
        assert stats["bytes"] == sum(clip.latent_CTHW.nbytes * (1 + more) for clip in output.clips.values())


def test_a_damaged_first_frame_stops_the_run_or_its_row_is_replaced(output, tmp_path):
    shutil.copytree(output.uri, tmp_path / "out")
    store = local_store(tmp_path / "out")
    index_key = next(key for key in sorted(store.keys("_index/")) if "v9x32x24" in key)
    row = read_index(store.read(index_key))[0][0]
    key = next(key for key in store.keys("data/") if key.rpartition(".")[0] in index_key.replace("_index", "data"))
    data = bytearray(store.read(key))
    data[row.others[1].offset + 5] ^= 1
    store.write(key, bytes(data))
    dataset = LatentDataset.open(str(tmp_path / "out"), columns=BOTH, where="num_frames = 9 and width = 24")
    with pytest.raises(InputError, match=f"{row.id} is damaged"):
        list(LatentLoader(dataset, batch=6, epochs=1, verify="always"))
    loader = LatentLoader(dataset, batch=6, epochs=1, on_damage="replace")
    for batch in loader:
        assert row.id not in batch.ids
        assert batch.columns["first_frame"] == [output.clips[name].first_frame for name in batch.ids]
    assert loader.stats()["damaged"] == 1


def test_what_cannot_be_given_is_refused(output, films):
    with pytest.raises(ConfigError, match="does not store i2v_cond; encode with --store i2v_cond"):
        LatentDataset.open(films["parquet"].uri, columns="i2v_cond")
    dataset = LatentDataset.open(output.uri, columns="i2v_cond")
    object.__setattr__(dataset.spec, "context_frames", 0)  # as of a network that encodes frames one by one
    with pytest.raises(ConfigError, match="a Window does not; use Prefix"):
        LatentLoader(dataset, batch=3, crop=Window(2))

"""Latents stored as int8 and zstd in rows, batches, crops, packs and caches: values as the codec defines them, damage, replaced rows."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import InputError
from pipeline.export.dataset import PublishedRows
from pipeline.format.codec import INT8, decoded, encoded, held_type
from pipeline.format.index import read_index
from pipeline.loader.cache import TensorCache
from pipeline.loader.crops import Prefix
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.loader import LatentLoader
from pipeline.loader.rules import Pack
from pipeline.operate.statistics import statistics
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests.loader.outputs import mixed_shards, write_output
from tests.pipeline.latent_clips import local_store, values_of

BOTH = ("first_frame", "i2v_cond")
CONFIGS = {
    "int8": WriteConfig(dtype="int8", store=BOTH),
    "int8-zstd-tar": WriteConfig(format="tar", dtype="int8", compression="zstd", store=BOTH),
    "bfloat16-zstd": WriteConfig(dtype="bfloat16", compression="zstd", moments=True, store=BOTH),
}


@pytest.fixture(scope="module", params=CONFIGS)
def output(request, tmp_path_factory):
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shards = mixed_shards(dtype=held_type(config.dtype), moments=config.moments, store=BOTH)
    return write_output(folder / "out", folder / "spool", shards, config)


@pytest.fixture
def dataset(output):
    return LatentDataset.open(output.uri, columns=BOTH)


def stored(array, dtype):
    """What a reader gets of a tensor that was written, float32."""
    if dtype == "float32":
        return torch.from_numpy(decoded(encoded(array, INT8).data, INT8, array.shape)).float()
    return torch.from_numpy(values_of(array, dtype))


def test_rows_and_batches_have_the_values_of_the_codec(output, dataset):
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dataset.spec.dtype]
    for row in dataset:
        clip = output.clips[row.id]
        assert (row.latent.dtype, row.i2v_cond.dtype) == (kind, kind)
        assert torch.equal(row.latent.float(), stored(clip.latent_CTHW, clip.dtype))
        assert torch.equal(row.i2v_cond.float(), stored(clip.cond_CTHW, clip.dtype))
        assert row.logvar is None or torch.equal(row.logvar.float(), stored(clip.logvar_CTHW, clip.dtype))
        assert row.columns["first_frame"] == clip.first_frame
    seen = 0
    for batch in LatentLoader(dataset, batch=3, epochs=1):
        assert batch.latents.dtype == kind
        for i, name in enumerate(batch.ids):
            clip = output.clips[name]
            assert torch.equal(batch.latents[i].float(), stored(clip.latent_CTHW, clip.dtype))
            assert torch.equal(batch.i2v_cond[i].float(), stored(clip.cond_CTHW, clip.dtype))
            assert batch.columns["first_frame"][i] == clip.first_frame
            seen += 1
    assert seen == len(output.clips)


def test_statistics_exports_and_verify_read_them(output):
    store = open_store(output.uri, StorageConfig())
    (found,) = statistics(store)["fingerprints"].values()
    assert found["sample"]["clips"] == len(output.clips)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(found["sample"][name], found["exact"][name], rtol=1e-6, atol=1e-6)
    report = verify_output(store)
    assert (report.ok, report.problems) == (True, [])
    rows = PublishedRows(output.uri)
    for row, latent in zip(listed := list(rows), rows.latents(listed, BOTH), strict=True):
        clip = output.clips[row.id]
        assert torch.equal(latent.mean.float(), stored(clip.latent_CTHW, clip.dtype))
        assert torch.equal(latent.cond.float(), stored(clip.cond_CTHW, clip.dtype))
        assert latent.first_frame == clip.first_frame


def test_types_crops_and_packs_are_those_of_plain_latents(output, dataset):
    options = {"posterior": "sample"} if dataset.spec.moments else {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        batch = next(iter(LatentLoader(dataset, batch=3, epochs=1, normalize="model", dtype=dtype, **options)))
        assert batch.latents.dtype == batch.i2v_cond.dtype == dtype
    (batch, *_) = LatentLoader(dataset, batch=3, epochs=1, normalize="model", dtype=torch.float32, crop=Prefix(2))
    clips = [output.clips[name] for name in batch.ids]
    wanted = torch.stack([stored(clip.latent_CTHW, clip.dtype)[:, :2] for clip in clips])
    torch.testing.assert_close(batch.latents, (wanted - 0.1) * 0.5)
    packed = next(iter(LatentLoader(dataset, batch=Pack(60), epochs=1)))
    for latent, name in zip(packed.latents, packed.ids, strict=True):
        clip = output.clips[name]
        assert torch.equal(latent.float(), stored(clip.latent_CTHW, clip.dtype))


def test_a_cache_holds_the_stored_bytes_and_gives_the_same_batches(output, dataset, tmp_path):
    cache = TensorCache(tmp_path / "cache", "10MB")
    first, second = (
        {name: latent.clone() for batch in loader for name, latent in zip(batch.ids, batch.latents, strict=True)}
        for loader in (LatentLoader(dataset, batch=3, epochs=1, cache=cache) for _ in range(2))
    )
    assert first.keys() == second.keys() == output.clips.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    loader = LatentLoader(dataset, batch=3, epochs=1, cache=cache)
    list(loader)
    stats = loader.stats()
    assert (stats["cache_hits"], stats["cache_misses"]) == (3 * len(output.clips), 0)
    folder = local_store(output.uri)
    rows = [row for key in folder.keys("_index/") for row in read_index(folder.read(key))[0]]
    held = {path.name: path.stat().st_size for path in (tmp_path / "cache").glob("??/*")}
    assert all(held[row.latent_hash] == row.latent_length for row in rows)


def test_damage_stops_the_run_or_its_row_is_replaced(output, tmp_path):
    shutil.copytree(output.uri, tmp_path / "out")
    store = local_store(tmp_path / "out")
    index_key = next(key for key in sorted(store.keys("_index/")) if "v9x32x24" in key)
    row = read_index(store.read(index_key))[0][0]
    key = next(key for key in store.keys("data/") if key.rpartition(".")[0] in index_key.replace("_index", "data"))
    data = bytearray(store.read(key))
    data[row.latent_offset : row.latent_offset + 4] = b"\xff" * 4  # of zstd its magic number
    store.write(key, bytes(data))
    dataset = LatentDataset.open(str(tmp_path / "out"), where="num_frames = 9 and width = 24")
    with pytest.raises(InputError, match=f"{row.id} is damaged"):
        list(LatentLoader(dataset, batch=6, epochs=1, verify="always"))
    if row.dtype.endswith("zstd"):
        with pytest.raises(InputError, match=f"{row.id} is damaged: .* bytes are not a zstd frame"):
            list(LatentLoader(dataset, batch=6, epochs=1, verify="never"))
    loader = LatentLoader(dataset, batch=6, epochs=1, on_damage="replace")
    for batch in loader:
        assert row.id not in batch.ids
        for latent, name in zip(batch.latents, batch.ids, strict=True):
            clip = output.clips[name]
            assert np.array_equal(latent.float().numpy(), stored(clip.latent_CTHW, clip.dtype).numpy())
    assert loader.stats()["damaged"] == 1

"""Tensors stored as int8 and zstd: values within half a step or bit for bit, damage, statistics, the documented recipe."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import webdataset as wds

from pipeline.config import WriteConfig
from pipeline.errors import BuildError, ConfigError, DamagedInput
from pipeline.format.card import data_card
from pipeline.format.codec import decoded, encoded, held_type, storage_name, stored_length, value_type
from pipeline.format.index import read_index
from pipeline.format.tensors import Span, SpanChecker, payload, payload_hash
from pipeline.ledger.part_statistics import measured
from tests.pipeline.latent_clips import (
    FINGERPRINT,
    METADATA,
    bits_of,
    latent_clip,
    latent_values,
    local_store,
    values_of,
    write_shard,
)

SHAPE = (4, 5, 8, 6)
PLAIN = ("float16", "bfloat16", "float32")
STORAGES = [("int8", "none"), ("int8", "zstd"), *((dtype, "zstd") for dtype in PLAIN)]
DOCUMENT = Path(__file__).parents[2].joinpath("docs", "formats.md").read_text()


def steps(values: np.ndarray) -> np.ndarray:
    """Range of each channel in 255 parts, `C 1 1 1`."""
    return (values.max((1, 2, 3), keepdims=True) - values.min((1, 2, 3), keepdims=True)) / 255


@pytest.mark.parametrize("seed", range(6))
def test_int8_is_off_by_at_most_half_a_step_and_cuts_nothing_off(seed: int) -> None:
    draws = np.random.default_rng(seed)
    size, offset = draws.choice([1e-6, 0.1, 1.0, 900.0], (2, 4, 1, 1, 1))
    values = (draws.standard_t(3, SHAPE) * size + offset).astype(np.float32)
    values[2] = offset[2, 0, 0, 0]  # a channel without variation
    stored = encoded(values, "int8").tobytes()
    scale, zero = np.frombuffer(stored, "<f4", 8).reshape(2, 4, 1, 1, 1)
    levels = np.frombuffer(stored, np.int8, offset=32).reshape(SHAPE)
    half = steps(values) / 2
    rounding = np.abs(values) * 2.0**-22
    assert (np.abs(levels * scale.astype(np.float64) + zero - values) <= half * 1.001 + rounding).all()
    for channel in (0, 1, 3):
        varies = values[channel].min() < values[channel].max()
        assert (levels[channel].min(), levels[channel].max()) == ((-128, 127) if varies else (0, 0))
    read = decoded(stored, "int8", SHAPE)
    assert read.dtype == np.float16
    assert (np.abs(read.astype(np.float64) - values) <= half * 1.001 + np.abs(values) * 2.0**-10 + 2.0**-24).all()
    assert (read[2] == np.float16(offset[2, 0, 0, 0])).all()


@pytest.mark.parametrize("dtype", PLAIN)
def test_zstd_gives_every_bit_back_and_takes_less_space(dtype: str) -> None:
    array = bits_of(latent_values(3), dtype)
    stored = encoded(array, f"{dtype}+zstd").tobytes()
    found = decoded(stored, f"{dtype}+zstd", array.shape)
    assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes())
    assert len(stored) < array.nbytes


@pytest.mark.parametrize("storage", ["float16", "int8", "int8+zstd", "float16+zstd"])
def test_other_bytes_are_refused(storage: str) -> None:
    held = np.float32 if storage.startswith("int8") else np.float16
    stored = encoded(latent_values(0).astype(held), storage).tobytes()
    assert stored_length(storage, SHAPE) == (None if storage.endswith("zstd") else len(stored))
    for wrong, shape in ((stored[:-3], SHAPE), (stored, (4, 5, 8, 5)), (b"", SHAPE)):
        with pytest.raises(ValueError, match="bytes are not a"):
            decoded(wrong, storage, shape)


def test_a_length_that_a_compressed_tensor_claims_is_not_believed() -> None:
    bomb = encoded(np.zeros((4, 500, 80, 60), np.float16), "float16+zstd").tobytes()
    with pytest.raises(ValueError, match="not a zstd frame of 1920 bytes"):
        decoded(bomb, "float16+zstd", SHAPE)


def recipe() -> dict[str, object]:
    """The function of docs/formats.md that reads a stored tensor."""
    scope: dict[str, object] = {}
    (block,) = re.findall(r"```python\n((?:(?!```).)*def values\(.*?)```", DOCUMENT, re.DOTALL)
    exec(block, scope)
    return scope


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("format", ["parquet", "tar"])
@pytest.mark.parametrize(("dtype", "compression"), STORAGES)
def test_files_hold_what_the_documented_recipe_reads(tmp_path: Path, format: str, dtype: str, compression: str) -> None:
    held, storage = held_type(dtype), storage_name(dtype, compression)
    clips = {clip.id: clip for clip in (latent_clip(n, dtype=held, store=("i2v_cond",)) for n in range(6))}
    options = {"format": format, "dtype": dtype, "compression": compression, "store": ("i2v_cond",)}
    store = local_store(tmp_path / "out")
    receipt = write_shard(store, tmp_path / "spool", WriteConfig(**options), list(clips.values()))
    (file,) = receipt.files
    rows, data = read_index(store.read(file.index_key))[0], store.read(file.key)
    values = recipe()["values"]
    read = {}
    for row in rows:
        assert (row.dtype, row.shape) == (storage, SHAPE)
        for span, array in zip(row.spans(), (clips[row.id].latent_CTHW, clips[row.id].cond_CTHW), strict=True):
            stored = data[span.offset : span.offset + span.length]
            found, wanted = values(stored, row.dtype, row.shape), values_of(array, held)
            bound = steps(wanted) * 0.501 if dtype == "int8" else 0
            assert (np.abs(found - wanted) <= bound).all()
            read.setdefault(row.id, stored)
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=True)
    for at in range(0, len(data), 1000):
        checker.feed(data[at : at + 1000])
    assert (checker.finish(), checker.problems) == (file.sha256, [])
    if format == "parquet":
        table = pq.read_table(io.BytesIO(data))
        assert table.schema.metadata[b"latentset"].count(b'"compression": "zstd"') == (compression == "zstd")
        for item in table.to_pylist():
            assert (item["vae_latent_bytes"], item["vae_latent_dtype"]) == (read[item["id"]], storage)
        return
    for sample in wds.WebDataset(store.uri(file.key), shardshuffle=False):
        tensors = safetensors.numpy.load(sample["latent.safetensors"])
        names = {"mean.scale", "mean.zero", "mean"} if storage == "int8" else {"mean"}
        assert tensors.keys() == names
        if storage == "int8":
            scale, zero = (tensors[name].reshape(4, 1, 1, 1) for name in ("mean.scale", "mean.zero"))
            found = tensors["mean"] * scale + zero
        else:
            assert sample["latent.safetensors"].count(storage.encode()) == 1
            found = values(tensors["mean"].tobytes(), storage, json.loads(sample["json"])["vae_latent_shape"])
        wanted = values(read[json.loads(sample["json"])["id"]], storage, SHAPE)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "compression"), [("float16", "none"), *STORAGES])
def test_the_data_card_says_how_to_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compression: str
) -> None:
    held, storage = held_type(dtype), storage_name(dtype, compression)
    clip, store = latent_clip(1, dtype=held), local_store(tmp_path / "out")
    write_shard(store, tmp_path / "spool", WriteConfig(dtype=dtype, compression=compression), [clip])
    card = data_card(FINGERPRINT, METADATA, container="parquet", dtype=storage, moments=False)
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, np.ndarray] = {}
    exec(card.split("```python\n")[1].partition("```")[0], scope)
    wanted = values_of(clip.latent_CTHW, held)
    bound = steps(wanted) * 0.501 if dtype == "int8" else 0
    assert (np.abs(values_of(scope["latent"], value_type(storage)) - wanted) <= bound).all()


def test_statistics_of_int8_are_those_of_what_is_read(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    clips = [latent_clip(n, dtype="float32") for n in range(3)]
    receipt = write_shard(store, tmp_path / "spool", WriteConfig(dtype="int8", compression="zstd"), clips)
    (file,) = receipt.files
    again = measured(store, [(file.key, row) for row in read_index(store.read(file.index_key))[0]])
    for name in ("n", "mean", "m2", "min", "max"):
        np.testing.assert_allclose(getattr(receipt.stats, name), getattr(again, name), rtol=1e-6)


def test_what_int8_cannot_hold_is_refused(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    large = latent_values(0)
    large[1, 2, 3, 4] = 70_000.0
    config = WriteConfig(dtype="int8", max_abs=1e6)
    with pytest.raises(DamagedInput, match="70000 in channel 1"):
        write_shard(store, tmp_path / "spool", config, [latent_clip(0, dtype="float32", array=large)])
    with pytest.raises(BuildError, match="is float16, the job stores int8, which is made from float32"):
        write_shard(store, tmp_path / "spool", config, [latent_clip(0)])


def test_moments_as_int8_are_refused() -> None:
    from pipeline.config import build_job

    with pytest.raises(ConfigError, match=r"int8 does not go with moments: .* use float16"):
        build_job({"inputs": "a.mp4", "output": "out", "write.dtype": "int8", "write.moments": True})


def test_infinities_in_compressed_tensors_are_found_and_damage_is_named() -> None:
    array = latent_values(0).astype(np.float16)
    array[1, 1, 1, 1] = np.inf
    stored = payload(array, "float16+zstd")
    for data, words in ((stored.data, "1 values NaN or infinite"), (stored.data[:-9], "zstd frame")):
        span = Span("a", 0, len(data), "float16+zstd", payload_hash(data), array.shape)
        checker = SpanChecker([span], finite=True)
        for at in range(0, len(data), 700):
            checker.feed(data[at : at + 700])
        checker.finish()
        assert [words in problem.found for problem in checker.problems] == [True]

"""Files as others open them: pyarrow, polars, duckdb and Hugging Face datasets for Parquet, webdataset for tar,
safetensors and numpy.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import WriteConfig
from pipeline.format.columns import SCALARS, parquet_schema
from pipeline.records import Bucket, LatentClip
from tests.pipeline.latent_clips import FINGERPRINT, METADATA, latent_clip, local_store, values_of, write_shard

UNCLOSED_BY_WEBDATASET = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
BUCKET = Bucket(17, 256, 192)
KINDS = [(dtype, moments) for dtype in ("float16", "bfloat16", "float32") for moments in (False, True)]
# Column names of FastVideo's text-to-video Parquet, text embeddings aside.
FASTVIDEO = [
    *("id", "vae_latent_bytes", "vae_latent_shape", "vae_latent_dtype", "file_name", "caption", "media_type"),
    *("width", "height", "num_frames", "duration_sec", "fps"),
]


def written(folder: Path, format: str, dtype: str, moments: bool) -> tuple[str, list[LatentClip]]:
    """A file of seven clips in several row groups, one without a caption; its path and the clips in row order."""
    kind: dict[str, Any] = {"bucket": BUCKET, "dtype": dtype, "moments": moments}
    clips = [latent_clip(n, **kind) for n in range(6)] + [latent_clip(6, caption=None, **kind)]
    config = WriteConfig(format=format, dtype=dtype, moments=moments, row_group_bytes=64 * 1024)
    store = local_store(folder / "out")
    receipt = write_shard(store, folder / "spool", config, clips)
    assert len(receipt.files) == 1
    return store.uri(receipt.files[0].key), clips


def tensor(data: bytes, shape: Any, dtype: str) -> np.ndarray:
    """What a reader does with the triplet, in one line and without Lathe: float32 values."""
    kind = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[dtype]
    return values_of(np.frombuffer(data, kind).reshape(list(shape)), dtype)


def check_rows(rows: list[dict[str, Any]], clips: list[LatentClip]) -> None:
    assert [row["id"] for row in rows] == [clip.id for clip in clips]
    for row, clip in zip(rows, clips, strict=True):
        latent = tensor(row["vae_latent_bytes"], row["vae_latent_shape"], row["vae_latent_dtype"])
        np.testing.assert_array_equal(latent, values_of(clip.latent_CTHW, clip.dtype))
        if clip.logvar_CTHW is not None:
            logvar = tensor(row["vae_logvar_bytes"], row["vae_logvar_shape"], row["vae_logvar_dtype"])
            np.testing.assert_array_equal(logvar, values_of(clip.logvar_CTHW, clip.dtype))
        assert row["caption"] == clip.sample.caption
        assert (row["width"], row["height"], row["num_frames"], row["fps"]) == (192, 256, 17, 8.0)
        assert list(row["crop"]) == [0, 19, 256, 192]
        assert list(row["warnings"]) == ["untagged_color:bt601"]
        assert json.loads(row["metadata"]) == clip.sample.metadata


@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_parquet_in_pyarrow(tmp_path: Path, dtype: str, moments: bool) -> None:
    path, clips = written(tmp_path, "parquet", dtype, moments)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        assert file.num_row_groups >= 4
        check_rows(file.read().to_pylist(), clips)
    table = pq.read_table(path, columns=["id", "bucket"], filters=[("bucket", "=", "v17x256x192")])
    assert table.num_rows == 7


@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_parquet_in_polars(tmp_path: Path, dtype: str, moments: bool) -> None:
    import polars

    path, clips = written(tmp_path, "parquet", dtype, moments)
    check_rows(polars.read_parquet(path).to_dicts(), clips)
    assert (
        polars.scan_parquet(path).filter(polars.col("id") == clips[3].id).select("caption").collect().item()
        == "Ein Café, 3"
    )


@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_parquet_in_duckdb(tmp_path: Path, dtype: str, moments: bool) -> None:
    import duckdb

    path, clips = written(tmp_path, "parquet", dtype, moments)
    with duckdb.connect() as connection:
        found = connection.execute("select * from read_parquet(?)", [path])
        names = [item[0] for item in found.description]
        check_rows([dict(zip(names, row, strict=True)) for row in found.fetchall()], clips)
        assert connection.execute(f"select sum(num_frames) from '{path}'").fetchone() == (7 * 17,)


@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_parquet_in_hugging_face_datasets(tmp_path: Path, dtype: str, moments: bool) -> None:
    import datasets

    path, clips = written(tmp_path, "parquet", dtype, moments)
    loaded = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    check_rows(list(loaded), clips)
    streamed = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    assert next(iter(streamed))["id"] == clips[0].id


@pytest.mark.parametrize("moments", [False, True])
def test_parquet_columns_are_those_of_the_document(tmp_path: Path, moments: bool) -> None:
    path, clips = written(tmp_path, "parquet", "float16", moments)
    schema = pq.read_schema(path)
    assert schema.remove_metadata().equals(parquet_schema(moments=moments))
    assert set(FASTVIDEO) <= set(schema.names)
    assert all(not schema.field(name).nullable for name in schema.names if name != "caption")
    assert schema.field("vae_latent_bytes").type == pa.binary()
    document = Path(__file__).parents[2].joinpath("docs", "formats.md").read_text()
    for name in [*SCALARS, "vae_latent_bytes", "vae_logvar_bytes"]:
        assert f"`{name}`" in document, f"docs/formats.md does not explain the column {name}"
    row = pq.read_table(path).to_pylist()[2]
    clip = clips[2]
    expected = {
        "file_name": "dir/video00002.mp4",
        "media_type": "video",
        "variant": "base",
        "source_uri": "s3://corpus/shard-000.tar",
        "source_key": "dir/video00002",
        "source_hash": clip.info.content_hash,
        "sample_index": 2,
        "clip_index": 0,
        "clip_start_sec": 0.0,
        "clip_end_sec": 2.125,
        "clip_start_frame": 0,
        "duration_sec": 2.125,
        "scaled_width": 230,
        "scaled_height": 256,
        "src_width": 640,
        "src_height": 480,
        "src_fps": 29.97,
        "codec": "h264",
        "color_matrix": "bt601",
        "color_range": "untagged",
        "fingerprint": FINGERPRINT,
    }
    assert {name: row[name] for name in expected} == expected


@UNCLOSED_BY_WEBDATASET
@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_tar_in_webdataset(tmp_path: Path, dtype: str, moments: bool) -> None:
    import safetensors.torch
    import torch
    import webdataset

    path, clips = written(tmp_path, "tar", dtype, moments)
    handler = webdataset.autodecode.Decoder(
        [webdataset.handle_extension("safetensors", safetensors.torch.load), webdataset.autodecode.basichandlers]
    )
    samples = [handler(sample) for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert [sample["__key__"] for sample in samples] == [clip.id for clip in clips]
    for sample, clip in zip(samples, clips, strict=True):
        if dtype == "bfloat16" or moments:
            tensors = sample["latent.safetensors"]
            assert set(tensors) == ({"mean", "logvar"} if moments else {"mean"})
            assert tensors["mean"].dtype == getattr(torch, dtype)
            np.testing.assert_array_equal(tensors["mean"].float().numpy(), values_of(clip.latent_CTHW, dtype))
            if moments:
                np.testing.assert_array_equal(tensors["logvar"].float().numpy(), values_of(clip.logvar_CTHW, dtype))
        else:
            assert sample["latent.npy"].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(sample["latent.npy"], clip.latent_CTHW)
        assert sample["txt"] == (clip.sample.caption or "")
        assert set(SCALARS) <= set(sample["json"])
        assert sample["json"]["caption"] == clip.sample.caption
        assert sample["json"]["fingerprint"] == FINGERPRINT
        assert json.loads(sample["json"]["metadata"]) == clip.sample.metadata


def test_tar_in_hugging_face_datasets(tmp_path: Path) -> None:
    import datasets

    path, clips = written(tmp_path, "tar", "float16", False)
    loaded = list(datasets.load_dataset("webdataset", data_files=path, split="train", streaming=True))
    assert [row["__key__"] for row in loaded] == [clip.id for clip in clips]
    np.testing.assert_array_equal(np.array(loaded[1]["latent.npy"], np.float16), clips[1].latent_CTHW)


def test_tar_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "tar", "float16", False)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert members[0].name == "__latentset__"
        metadata = json.load(archive.extractfile(members[0]))
    assert (metadata["fingerprint"], metadata["spec"]) == (FINGERPRINT, json.loads(json.dumps(METADATA["spec"])))
    assert {(item.mtime, item.uid, item.gid, item.uname, item.gname) for item in members} == {(0, 0, 0, "", "")}
    assert [item.name for item in members[1:4]] == [
        f"video00000-0000.{ending}" for ending in ("latent.npy", "txt", "json")
    ]


@UNCLOSED_BY_WEBDATASET
def test_tar_names_longer_than_a_plain_header_holds(tmp_path: Path) -> None:
    from dataclasses import replace

    import webdataset

    name = "x" * 180
    store = local_store(tmp_path / "out")
    clip = replace(latent_clip(0), id=name)
    receipt = write_shard(store, tmp_path / "s", WriteConfig(format="tar"), [clip])
    (sample,) = webdataset.WebDataset(store.uri(receipt.files[0].key), shardshuffle=False)
    assert sample["__key__"] == name
    np.testing.assert_array_equal(np.load(io.BytesIO(sample["latent.npy"])), clip.latent_CTHW)

"""What the shard writer promises: layout, order, offsets, limits, checks, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import WriteConfig
from pipeline.errors import BuildError, DamagedInput
from pipeline.format.index import read_index
from pipeline.format.tensors import SpanChecker, measure, payload_hash
from pipeline.records import Bucket
from pipeline.storage import Store
from tests.pipeline.latent_clips import (
    FINGERPRINT,
    METADATA,
    PARTS,
    WHOLE,
    bits_of,
    latent_clip,
    latent_values,
    local_store,
    shard_of,
    shard_writer,
    values_of,
    write_shard,
)

FORMATS = ("parquet", "tar")
DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def test_keys_and_written_files(store: Store, spool: Path) -> None:
    receipt = write_shard(
        store, spool, WriteConfig(), [latent_clip(0), latent_clip(1, bucket=Bucket(5, 32, 32), num_frames=5)]
    )
    shard = shard_of().id(FINGERPRINT)
    assert [item.key for item in receipt.files] == [
        f"data/f0e1d2c3/v17x64x48/{shard[:16]}-a1-00000.parquet",
        f"data/f0e1d2c3/v5x32x32/{shard[:16]}-a1-00001.parquet",
    ]
    for item in receipt.files:
        data, index = store.read(item.key), store.read(item.index_key)
        assert item.index_key == item.key.replace("data/", "_index/").replace(".parquet", ".idx")
        assert (item.num_bytes, item.index_bytes) == (len(data), len(index))
        assert item.sha256 == hashlib.sha256(data).hexdigest()
        assert item.index_sha256 == hashlib.sha256(index).hexdigest()
        frames = 17 if "v17x" in item.bucket else 5
        assert (item.rows, item.frames) == (1, frames)
        (row,) = pq.read_table(io.BytesIO(data)).to_pylist()
        assert item.ranges == {"id": [row["id"]] * 2, "fps": [row["fps"]] * 2, "num_frames": [frames] * 2}
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [False, True])
def test_index_offsets_point_at_the_tensors(store: Store, spool: Path, format: str, dtype: str, moments: bool) -> None:
    config = WriteConfig(format=format, dtype=dtype, moments=moments, row_group_bytes=64 * 1024)
    clips = {clip.id: clip for clip in (latent_clip(n, dtype=dtype, moments=moments) for n in range(40))}
    receipt = write_shard(store, spool, config, list(clips.values()))
    rows, metadata = read_index(store.read(receipt.files[0].index_key))
    data = store.read(receipt.files[0].key)
    assert [row.row for row in rows] == list(range(40))
    assert {row.id for row in rows} == set(clips)
    for row in rows:
        clip = clips[row.id]
        found = data[row.latent_offset : row.latent_offset + row.latent_length]
        assert found == clip.latent_CTHW.tobytes()
        assert row.latent_hash == payload_hash(found)
        assert (row.shape, row.dtype, row.bucket) == ((4, 5, 8, 6), dtype, "v17x64x48")
        assert (row.caption, row.source_hash) == (clip.sample.caption, clip.info.content_hash)
        if moments:
            assert data[row.logvar_offset : row.logvar_offset + row.logvar_length] == clip.logvar_CTHW.tobytes()
        else:
            assert row.logvar_offset is None
    assert metadata["data"] == {"key": receipt.files[0].key, "num_bytes": len(data), "sha256": receipt.files[0].sha256}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "moments"), [("float16", False), ("bfloat16", True)])
def test_condition_and_first_frame_have_their_own_ranges(
    store: Store, spool: Path, format: str, dtype: str, moments: bool
) -> None:
    kind: dict[str, Any] = {"dtype": dtype, "moments": moments, "store": ("first_frame", "i2v_cond")}
    clips = {clip.id: clip for clip in (latent_clip(n, **kind) for n in range(8))}
    receipt = write_shard(
        store, spool, WriteConfig(format=format, row_group_bytes=64 * 1024, **kind), list(clips.values())
    )
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    data = store.read(receipt.files[0].key)
    assert len(rows) == len(clips)
    for row in rows:
        clip = clips[row.id]
        cond, image = row.others
        assert data[cond.offset : cond.offset + cond.length] == clip.cond_CTHW.tobytes()
        assert data[image.offset : image.offset + image.length] == clip.first_frame
        assert [place.hash for place in row.others] == [
            payload_hash(clip.cond_CTHW.tobytes()),
            payload_hash(clip.first_frame),
        ]
        assert [span.dtype for span in row.spans()] == [dtype] * (3 if moments else 2) + [None]
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=True)
    checker.feed(data)
    assert (checker.finish(), checker.problems) == (receipt.files[0].sha256, [])


def test_clips_with_other_tensors_than_the_job_stores_are_refused(store: Store, spool: Path) -> None:
    with shard_writer(store, spool, WriteConfig(store=("i2v_cond",))) as writer:
        with pytest.raises(BuildError, match="has latent, first_frame, the job stores latent, i2v_cond"):
            writer.add(latent_clip(0, store=("first_frame",)))
        clip = latent_clip(1, store=("i2v_cond",))
        assert clip.cond_CTHW is not None
        clip.cond_CTHW[0, 0, 0, 0] = np.nan
        with pytest.raises(DamagedInput, match="i2v_cond of clip 0"):
            writer.add(clip)


def test_equal_and_constant_latents_are_told_apart(store: Store, spool: Path) -> None:
    """Offsets are found by content; tensors of zeros, and the same tensor twice, must still get their own ranges."""
    zeros = np.zeros((4, 5, 8, 6), np.float16)
    clips = [latent_clip(n, array=zeros) for n in range(5)] + [
        latent_clip(n, array=latent_clip(9).latent_CTHW) for n in (5, 6)
    ]
    receipt = write_shard(store, spool, WriteConfig(), clips)
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    ranges = [(row.latent_offset, row.latent_offset + row.latent_length) for row in rows]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_sorted_inside_a_row_group(store: Store, spool: Path, format: str) -> None:
    clips = [latent_clip(n, clip=c) for n, c in ((3, 0), (1, 1), (2, 0), (1, 0), (0, 0))]
    receipt = write_shard(store, spool, WriteConfig(format=format), clips)
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    assert [row.id for row in rows] == [
        "video00000-0000",
        "video00001-0000",
        "video00001-0001",
        "video00002-0000",
        "video00003-0000",
    ]


def test_row_groups_by_bytes_and_rolled_files(store: Store, spool: Path) -> None:
    bucket = Bucket(17, 512, 512)  # 4*5*64*64 fp16 = 160 KiB
    config = WriteConfig(row_group_bytes=400 * 1024, file_bytes=1024 * 1024)
    receipt = write_shard(store, spool, config, [latent_clip(n, bucket=bucket) for n in range(12)])
    assert [item.rows for item in receipt.files] == [8, 4]
    assert [item.key[-13:-8] for item in receipt.files] == ["00000", "00001"]
    footer = pq.read_metadata(store.uri(receipt.files[0].key))
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [2, 2, 2, 2]
    column = footer.row_group(0).column(1)
    assert (column.path_in_schema, column.compression, column.has_dictionary_page) == (
        "vae_latent_bytes",
        "UNCOMPRESSED",
        False,
    )
    assert column.has_offset_index
    assert not column.is_stats_set


def test_many_open_buckets_stay_within_a_few_row_groups(
    store: Store, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.writer.OPEN_BYTES", 0)
    config = WriteConfig(row_group_bytes=64 * 1024)
    with shard_writer(store, spool, config) as writer:
        for n in range(40):  # 30 KiB each, every one in a bucket of its own
            writer.add(latent_clip(n, bucket=Bucket(17, 256, 8 * (n + 1)), num_frames=17))
            held = sum(opened.waiting_bytes for opened in writer._open.values())
            assert held <= 4 * config.row_group_bytes
        files, _ = writer.finish()
    assert len(files) == 40


@pytest.mark.parametrize("format", FORMATS)
def test_whole_clips_of_any_length_share_a_bucket(store: Store, spool: Path, format: str) -> None:
    clips = [latent_clip(n, bucket=WHOLE, num_frames=frames) for n, frames in enumerate((5, 41, 1))]
    receipt = write_shard(store, spool, WriteConfig(format=format), clips)
    assert [(item.bucket, item.rows, item.frames) for item in receipt.files] == [("vnx64x48", 3, 47)]
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    assert [row.shape[1] for row in rows] == [2, 11, 1]


def test_memory_mapped_latents_are_written_from_the_map(store: Store, spool: Path, tmp_path: Path) -> None:
    values = bits_of(latent_values(0, 401, WHOLE), "float16")
    mapped = np.memmap(tmp_path / "long.bin", np.float16, "w+", shape=values.shape)
    mapped[:] = values
    receipt = write_shard(store, spool, WriteConfig(), [latent_clip(0, bucket=WHOLE, num_frames=401, array=mapped)])
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    assert store.read_range(receipt.files[0].key, rows[0].latent_offset, rows[0].latent_length) == values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_stored_values(store: Store, spool: Path, dtype: str) -> None:
    clips = [latent_clip(n, dtype=dtype) for n in range(7)] + [
        latent_clip(8, dtype=dtype, bucket=WHOLE, num_frames=401)
    ]
    stats = write_shard(store, spool, WriteConfig(dtype=dtype), clips).stats
    stored = np.concatenate([values_of(clip.latent_CTHW, dtype).reshape(4, -1) for clip in clips], axis=1).astype(
        np.float64
    )
    assert stats.n == stored.shape[1]
    np.testing.assert_allclose(stats.mean, stored.mean(1), rtol=1e-6)
    np.testing.assert_allclose(np.array(stats.m2) / stats.n, stored.var(1), rtol=1e-6)
    np.testing.assert_array_equal(stats.min, stored.min(1))
    np.testing.assert_array_equal(stats.max, stored.max(1))


def test_every_finite_half_is_measured_exactly() -> None:
    """All 63488 of them, subnormals and both zeros too."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    stats = measure(finite.reshape(4, -1, 8, 8), "float16", 1e9, key="k", clip=0)
    channels = finite.reshape(4, -1).astype(np.float64)
    assert (stats.min, stats.max) == (tuple(channels.min(1)), tuple(channels.max(1)))
    np.testing.assert_allclose(stats.mean, channels.mean(1), rtol=1e-5)
    np.testing.assert_allclose(np.array(stats.m2) / stats.n, channels.var(1), rtol=1e-5)
    for bits in (0x7C00, 0xFC00, 0x7C01, 0xFFFF):
        bad = finite.reshape(4, -1, 8, 8).copy()
        bad[1, 2, 3, 4] = np.uint16(bits).view(np.float16)
        with pytest.raises(DamagedInput, match=r"(nan|inf) in channel 1|from -?(nan|inf)"):
            measure(bad, "float16", 1e9, key="k", clip=0)


def test_statistics_far_from_zero_do_not_cancel() -> None:
    values = (np.random.default_rng(0).standard_normal((2, 300, 32, 32)) * 0.01 + 900).astype(np.float32)
    stats = measure(values, "float32", 1e4, key="k", clip=0)
    np.testing.assert_allclose(np.array(stats.m2) / stats.n, values.reshape(2, -1).astype(np.float64).var(1), rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 20_000.0])
def test_absurd_values_cost_their_clip_only(store: Store, spool: Path, dtype: str, bad: float) -> None:
    values = latent_values(1)
    values[2, 3, 4, 5] = bad
    with shard_writer(store, spool, WriteConfig(dtype=dtype)) as writer:
        writer.add(latent_clip(0, dtype=dtype))
        with pytest.raises(DamagedInput, match=r"latent of clip 3 has values .* in channel 2") as caught:
            writer.add(latent_clip(1, dtype=dtype, clip=3, array=bits_of(values, dtype)))
        writer.add(latent_clip(2, dtype=dtype))
        files, stats = writer.finish()
    assert (caught.value.key, caught.value.reason) == ("dir/video00001", "non_finite_latent")
    assert [item.rows for item in files] == [2]
    assert np.abs(stats.max).max() < 1e4


def test_what_float16_cannot_hold_is_absurd_whatever_the_limit(store: Store, spool: Path) -> None:
    values = latent_values(1)
    values[1, 0, 0, 0] = 70_000.0
    with np.errstate(over="ignore"):
        stored = bits_of(values, "float16")
    with shard_writer(store, spool, WriteConfig(max_abs=1e9)) as writer:
        with pytest.raises(DamagedInput, match=r"to inf in channel 1.*within ±65504.*the largest float16 is 65504"):
            writer.add(latent_clip(1, array=stored))
        writer.add(latent_clip(1))  # the id is free: nothing of the refused clip was kept
        assert [item.rows for item in writer.finish()[0]] == [1]


def test_bad_log_variance_is_refused_too(store: Store, spool: Path) -> None:
    clip = latent_clip(0, moments=True)
    clip.logvar_CTHW[0, 0, 0, 0] = np.nan
    with (
        shard_writer(store, spool, WriteConfig(moments=True)) as writer,
        pytest.raises(DamagedInput, match="log-variance of clip 0"),
    ):
        writer.add(clip)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (replace(latent_clip(1), id="a.b"), r"'a.b' must match"),
        (replace(latent_clip(1), id="a\n"), r"must match"),
        (latent_clip(0), "occurs twice"),
        (replace(latent_clip(1), num_frames=13), "13 frames, expected 17"),
        (latent_clip(1, bucket=WHOLE, num_frames=16, array=np.zeros((4, 4, 8, 6), np.float16)), r"expected 4n\+1"),
        (latent_clip(1, array=np.zeros((4, 5, 6, 8), np.float16)), r"expected \(4, 5, 8, 6\)"),
        (latent_clip(1, dtype="float32"), "is float32, the job stores float16"),
        (latent_clip(1, moments=True), "has latent, logvar, the job stores latent"),
    ],
)
def test_misshapen_clips_are_refused(store: Store, spool: Path, clip: object, message: str) -> None:
    with shard_writer(store, spool, WriteConfig()) as writer:
        writer.add(latent_clip(0))
        with pytest.raises(BuildError, match=message):
            writer.add(clip)


def test_wrong_numpy_type_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="of numpy <f2, got >f2"):
        latent_clip(0, array=np.zeros((4, 5, 8, 6), ">f2"))


def test_an_empty_shard_has_no_files(store: Store, spool: Path) -> None:
    with shard_writer(store, spool, WriteConfig()) as writer:
        assert writer.finish() == ((), None)
    assert list(store.list()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_equal_rows_give_equal_bytes(tmp_path: Path, format: str) -> None:
    clips = [latent_clip(n) for n in range(6)]
    one = write_shard(local_store(tmp_path / "1"), tmp_path / "s1", WriteConfig(format=format), clips, attempt="a1")
    two = write_shard(
        local_store(tmp_path / "2"), tmp_path / "s2", WriteConfig(format=format), clips[::-1], attempt="zz"
    )
    assert [item.sha256 for item in one.files] == [item.sha256 for item in two.files]


def test_file_metadata_says_everything(store: Store, spool: Path) -> None:
    receipt = write_shard(
        store, spool, WriteConfig(dtype="bfloat16", moments=True), [latent_clip(0, dtype="bfloat16", moments=True)]
    )
    found = json.loads(pq.read_metadata(store.uri(receipt.files[0].key)).metadata[b"latentset"])
    assert found["spec"] == json.loads(json.dumps(METADATA["spec"]))
    assert (found["fingerprint"], found["fingerprint_parts"]) == (FINGERPRINT, PARTS)
    assert found["latent"] == {"posterior": "moments", "dtype": "bfloat16", "layout": "CTHW", "byte_order": "little"}
    assert found["normalisation"] == {"applied": False, "scale": 0.5, "shift": 0.1, "mean": None, "std": None}
    assert (found["format"], found["format_version"], found["bucket"]) == ("latentset", 2, "v17x64x48")


@pytest.mark.parametrize("format", FORMATS)
def test_text_of_any_kind_survives_or_is_made_visible(store: Store, spool: Path, format: str) -> None:
    clips = [
        latent_clip(0, caption="日本語 \U0001f600 \x00 \n\ttab", metadata={"x": "\ud800"}),
        latent_clip(1, caption="lone \udcff surrogate", key="odd/\udce9t\udce9"),
        latent_clip(2, caption=None, metadata={}),
    ]
    receipt = write_shard(store, spool, WriteConfig(format=format), clips)
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    assert [row.caption for row in rows] == ["日本語 \U0001f600 \x00 \n\ttab", "lone \\udcff surrogate", None]
    if format == "parquet":
        table = pq.read_table(store.uri(receipt.files[0].key))
        assert table["source_key"].to_pylist()[1] == "odd/\\udce9t\\udce9"
        assert json.loads(table["metadata"][0].as_py()) == {"x": "\ud800"}


@pytest.mark.parametrize("step", [1, 3, 1000, 10**6])
def test_span_checker_does_not_depend_on_the_pieces(store: Store, spool: Path, step: int) -> None:
    receipt = write_shard(
        store, spool, WriteConfig(dtype="float32"), [latent_clip(n, dtype="float32") for n in range(2)]
    )
    data = bytearray(store.read(receipt.files[0].key))
    rows, _ = read_index(store.read(receipt.files[0].index_key))
    at = rows[1].latent_offset
    data[at + 4 : at + 8] = np.float32(np.nan).tobytes()
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=True)
    for begin in range(0, len(data), step):
        checker.feed(bytes(data[begin : begin + step]))
    assert checker.finish() == hashlib.sha256(data).hexdigest()
    assert [(problem.id, problem.expected) for problem in checker.problems] == [
        ("video00001-0000", f"hash {rows[1].latent_hash}"),
        ("video00001-0000", "finite values"),
    ]

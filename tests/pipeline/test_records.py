"""Records that reach disk check themselves, and no record prints an array."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline.errors import DamagedInput, PolicyReject
from pipeline.records import (
    Bucket,
    ChannelStats,
    ClipPlan,
    FrameChunk,
    LatentClip,
    Reject,
    SourceObject,
    WrittenFile,
)
from tests.pipeline.latent_clips import latent_clip

CLIP = latent_clip(0)
FILE = WrittenFile("data/a.parquet", "index/a.parquet", "17x64x64", 100, 10, 1, "0" * 64, "1" * 64)
SHAPE = CLIP.latent_CTHW.shape


def records() -> Iterator[type]:
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if not module.name.endswith("__main__"):
            for found in vars(importlib.import_module(module.name)).values():
                if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module.name:
                    yield found


def test_no_record_prints_an_array_or_bytes():
    large = ("np.ndarray", "torch.Tensor", "bytes")
    printed = [
        f"{kind.__module__}.{kind.__name__}.{item.name}"
        for kind in records()
        if not kind.__name__.startswith("_") and hasattr(kind.__repr__, "__wrapped__")  # a repr that dataclass made
        for item in dataclasses.fields(kind)
        if item.repr and set(str(item.type).split(" | ")) & set(large)
    ]
    assert printed == []


@pytest.mark.parametrize("record", [CLIP, CLIP.sample, CLIP.sample.encoded_video])
def test_repr_of_a_record_with_a_video_or_latent_is_short(record):
    assert len(repr(record)) < 1500
    assert "encoded bytes" not in repr(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "wants a dtype of float16, bfloat16, float32, got 'float64'"),
        ({"dtype": "float32"}, r"LatentClip of float32 wants a latent \(C, t, h, w\) of numpy <f4, got <f2"),
        ({"latent_CTHW": CLIP.latent_CTHW[0]}, r"wants a latent \(C, t, h, w\)"),
        ({"latent_CTHW": CLIP.latent_CTHW[:, :0]}, r"wants a latent \(C, t, h, w\)"),
        ({"latent_CTHW": CLIP.latent_CTHW.astype(">f2")}, "numpy <f2, got >f2"),
        ({"logvar_CTHW": CLIP.latent_CTHW[:1]}, "wants a log-variance like its latent"),
        ({"logvar_CTHW": CLIP.latent_CTHW.astype(np.float32)}, "wants a log-variance like its latent"),
        ({"num_frames": 0}, "at least 1 frame"),
        ({"end_s": float("nan")}, "a finite end"),
    ],
)
def test_latent_clip_rejects_wrong_shapes_types_and_ranges(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(CLIP, **change)


def test_latent_clip_accepts_each_storage_type_and_memory_maps(tmp_path):
    for dtype, numpy_dtype in (("float16", "<f2"), ("bfloat16", "<u2"), ("float32", "<f4")):
        array = np.memmap(tmp_path / dtype, numpy_dtype, "w+", shape=SHAPE)
        assert isinstance(replace(CLIP, latent_CTHW=array, logvar_CTHW=array, dtype=dtype), LatentClip)


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (SourceObject("s3://b/k", 1, "e"), {"size": -1}),
        (SourceObject("s3://b/k", 1, "e"), {"uri": ""}),
        (FILE, {"num_bytes": -1}),
        (FILE, {"rows": -1}),
        (FILE, {"index_key": ""}),
        (ChannelStats(1, (0.0,), (0.0,), (0.0,), (0.0,)), {"max": (0.0, 1.0)}),
        (ChannelStats(1, (0.0,), (0.0,), (0.0,), (0.0,)), {"n": -1}),
        (Reject("k", "decode", "undecodable", "m", False), {"reason": ""}),
        (Reject("k", "decode", "undecodable", "m", False), {"clip": -1}),
        (CLIP.info, {"width": 0}),
        (CLIP.info, {"rotation": 45}),
        (CLIP.info, {"fps": float("nan")}),
        (CLIP.info, {"sample_aspect": (0, 1)}),
        (CLIP.plan, {"start": -1}),
        (CLIP.plan, {"crop_left": 10_000}),
        (CLIP.plan, {"fps": float("nan")}),
        (FrameChunk(0, np.zeros((1, 3, 2, 2), np.uint8), (0.0,), "bt709", True, True), {"pts_s": ()}),
    ],
)
def test_records_reject_values_out_of_range(record, change):
    with pytest.raises(ValueError, match=f"^{type(record).__name__} wants "):
        replace(record, **change)


def test_crop_of_a_clip_may_touch_the_edges():
    ClipPlan(0, 0, Bucket(0, 8, 8), 25.0, 0.0, scaled_height=8, scaled_width=10, crop_top=0, crop_left=2)


def test_reject_of_an_error_has_its_reason_stage_and_policy():
    error = PolicyReject("hdr", "HDR video", stage="decode")
    assert Reject.from_error(error, CLIP.sample, "encode", clip=3, frames_recovered=2) == Reject(
        CLIP.sample.key, "decode", "hdr", "HDR video", True, CLIP.sample.uri, 3, 2
    )
    reject = Reject.from_error(DamagedInput("undecodable", "m"), CLIP.sample.encoded_video, "encode")
    assert (reject.stage, reject.policy, reject.clip) == ("encode", False, None)

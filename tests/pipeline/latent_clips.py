"""Latent clips and shards as the engine hands them to the writer, for tests of what is stored."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.interface import LatentSpec
from pipeline.config import DrillConfig, StorageConfig, WriteConfig
from pipeline.format.layout import CURRENT, Layout
from pipeline.records import (
    Bucket,
    ClipPlan,
    Counts,
    LatentClip,
    MemberRule,
    Receipt,
    Reject,
    Sample,
    Shard,
    SourceObject,
    Timings,
    VideoInfo,
    WrittenFile,
)
from pipeline.storage import Store, open_store
from pipeline.writer import ShardWriter

SPEC = LatentSpec("tiny", latent_channels=4, value_range=(-0.5, 0.5), scale=0.5, shift=0.1)
FINGERPRINT = "f0e1d2c3" + "0" * 24
PARTS = {"encoder": {"network": "tiny"}, "weights": "sha256:00", "fps": 8.0}
METADATA = {
    "spec": SPEC.to_dict(),
    "encoder": {"network": "tiny", "checkpoint": {"uri": "untrained"}},
    "fingerprint_parts": PARTS,
    "versions": {"lathe": "test"},
}
SMALL = Bucket(17, 64, 48)
WHOLE = Bucket(0, 64, 48)


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the array that carries them in `dtype`; bfloat16 by truncation, as uint16 bits."""
    if dtype == "bfloat16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return values.astype(np.dtype(dtype).newbyteorder("<"))


def values_of(array: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `bits_of`, float32."""
    if dtype == "bfloat16":
        return (array.astype("<u4") << 16).view("<f4")
    return array.astype("<f4")


def latent_values(seed: int, num_frames: int = 17, bucket: Bucket = SMALL) -> np.ndarray:
    shape = (4, (num_frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
    return np.random.default_rng(seed).normal(0.3, 2.0, shape).astype(np.float32)


def latent_clip(
    seed: int,
    *,
    bucket: Bucket = SMALL,
    num_frames: int = 17,
    dtype: str = "float16",
    moments: bool = False,
    clip: int = 0,
    array: np.ndarray | None = None,
    store: tuple[str, ...] = (),
    **sample: Any,
) -> LatentClip:
    """Clip `clip` of sample number `seed`; the latent's values follow from `seed`."""
    described = {
        "key": f"dir/video{seed:05d}",
        "uri": "s3://corpus/shard-000.tar",
        "video": b"encoded bytes",
        "caption": f"Ein Café, {seed}",
        "metadata": {"url": f"https://example.org/{seed}", "nested": {"score": 0.5}},
    } | sample
    return LatentClip(
        id=f"video{seed:05d}-{clip:04d}",
        sample=Sample(index=seed, video_ext="mp4", **described),
        info=VideoInfo(
            codec="h264",
            pixel_format="yuv420p",
            width=640,
            height=480,
            coded_width=640,
            coded_height=480,
            rotation=0,
            sample_aspect=(1, 1),
            fps=29.97,
            num_frames=300,
            duration_s=10.01,
            color_matrix="bt601",
            color_range="untagged",
            content_hash=f"{seed:032x}",
            warnings=("untagged_color:bt601",),
        ),
        plan=ClipPlan(
            index=clip,
            start=clip * 17,
            bucket=bucket,
            fps=8.0,
            start_s=clip * 2.125,
            scaled_height=max(64, bucket.height),
            scaled_width=bucket.width + 38,
            crop_top=0,
            crop_left=19,
        ),
        num_frames=num_frames,
        end_s=clip * 2.125 + num_frames / 8.0,
        latent_CTHW=bits_of(latent_values(seed, num_frames, bucket), dtype) if array is None else array,
        logvar_CTHW=bits_of(latent_values(seed + 10_000, num_frames, bucket), dtype) if moments else None,
        dtype=dtype,
        cond_CTHW=bits_of(latent_values(seed + 20_000, num_frames, bucket), dtype) if "i2v_cond" in store else None,
        first_frame=first_frame(seed, bucket) if "first_frame" in store else None,
    )


def first_frame(seed: int, bucket: Bucket = SMALL) -> bytes:
    """A lossless WebP whose pixels follow from `seed`; another seed gives another length."""
    pixels = np.random.default_rng(seed).integers(0, 256, (bucket.height, bucket.width, 3), np.uint8)
    pixels[seed % bucket.height :] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True)
    return out.getvalue()


def local_store(folder: Path) -> Store:
    return open_store(str(folder), StorageConfig())


def shard_of(number: int = 0) -> Shard:
    return Shard(
        "tar", f"shard-{number:03d}.tar", (SourceObject(f"s3://corpus/shard-{number:03d}.tar", 1000, f"e{number}"),)
    )


def shard_writer(
    store: Store,
    spool: Path,
    config: WriteConfig,
    *,
    shard: int = 0,
    attempt: str = "a1",
    drill: DrillConfig | None = None,
    layout: Layout = CURRENT,
    members: tuple[str, ...] = (),
    unpaired: bool = False,
) -> ShardWriter:
    rule = MemberRule(tuple((name, f"{name}.mp4") for name in members), unpaired=unpaired)
    parts = PARTS | ({"members": rule.to_dict()} if rule else {})
    return ShardWriter(
        store,
        spool,
        config,
        shard_id=shard_of(shard).id(FINGERPRINT),
        attempt=attempt,
        fingerprint=FINGERPRINT,
        metadata=METADATA | {"fingerprint_parts": parts},
        layout=layout,
        drill=drill or DrillConfig(),
        members=members,
        unpaired=unpaired,
    )


def receipt_of(
    files: tuple[WrittenFile, ...],
    stats: Any,
    *,
    shard: int = 0,
    attempt: str = "a1",
    rejects: tuple[Reject, ...] = (),
    created: str | None = None,
    layout: Layout = CURRENT,
) -> Receipt:
    """Receipt whose counts add up, one clip per sample."""
    clips = sum(item.rows for item in files)
    return Receipt(
        format_version=layout.version,
        shard_id=shard_of(shard).id(FINGERPRINT),
        shard=shard_of(shard),
        fingerprint=FINGERPRINT,
        fingerprint_parts=PARTS,
        attempt=attempt,
        created=created or datetime.now(UTC).isoformat(timespec="microseconds"),
        files=files,
        counts=Counts(
            samples=clips + len(rejects),
            encoded=clips,
            rejected=len(rejects),
            clips_planned=clips,
            clips=clips,
            frames=sum(item.frames for item in files),
            damaged=sum(not reject.policy for reject in rejects),
        ),
        rejects=rejects,
        stats=stats,
        timings=Timings(encode_s=1.0, total_s=2.0),
    )


def write_shard(
    store: Store, spool: Path, config: WriteConfig, clips: list[LatentClip], *, shard: int = 0, **kw: Any
) -> Receipt:
    """Writes `clips` and returns the receipt, not yet committed."""
    given = {name: kw.pop(name) for name in ("rejects", "created") if name in kw}
    with shard_writer(store, spool, config, shard=shard, **kw) as writer:
        for clip in clips:
            writer.add(clip)
        files, stats = writer.finish()
    return receipt_of(
        files, stats, shard=shard, attempt=kw.get("attempt", "a1"), layout=kw.get("layout", CURRENT), **given
    )

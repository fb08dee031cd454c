"""Rows of latent files: scalar columns, tensor payloads and sort order of one clip, for both containers.

Turns a `LatentClip` into a `LatentRow`, which does not hold the encoded video. Checks the id, and that latent sizes follow from frames and
pixels.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import BuildError
from pipeline.format.stored import (
    FIRST_FRAME,
    I2V_COND,
    LATENT,
    LOGVAR,
    is_tensor,
    stored_names,
    tensor_column,
    tensor_shape,
)
from pipeline.format.tensors import Payload, image_payload, payload
from pipeline.records import LatentClip

if TYPE_CHECKING:
    from collections.abc import Collection

_TEXT, _INT, _REAL = pa.string(), pa.int64(), pa.float64()

SCALARS: dict[str, pa.DataType] = {
    "caption": _TEXT,
    "file_name": _TEXT,
    "media_type": _TEXT,
    "width": _INT,
    "height": _INT,
    "num_frames": _INT,
    "duration_sec": _REAL,
    "fps": _REAL,
    "bucket": _TEXT,
    "variant": _TEXT,
    "source_uri": _TEXT,
    "source_key": _TEXT,
    "source_hash": _TEXT,
    "sample_index": _INT,
    "clip_index": _INT,
    "clip_start_sec": _REAL,
    "clip_end_sec": _REAL,
    "clip_start_frame": _INT,
    "crop": pa.list_(pa.int32()),
    "scaled_width": _INT,
    "scaled_height": _INT,
    "src_width": _INT,
    "src_height": _INT,
    "src_fps": _REAL,
    "codec": _TEXT,
    "color_matrix": _TEXT,
    "color_range": _TEXT,
    "warnings": pa.list_(_TEXT),
    "captions": pa.list_(_TEXT),
    "caption_names": pa.list_(_TEXT),
    "metadata": _TEXT,
    "fingerprint": _TEXT,
}
"""Columns that are not tensors, in file order; docs/formats.md says what each means."""

_NULLABLE = {"caption"}
METADATA_MEMBER = "__latentset__"
"""First member of a tar: the file's metadata as JSON. WebDataset readers skip names of this form, but not with an extension."""

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class LatentRow:
    """One row. `scalars` are the columns of `SCALARS` in order; `tensors` what it stores by name (`format.stored`), in file order."""

    id: str
    order: tuple[
        int, int
    ]  # (sample index in the shard, number of the clip's variant in the video): rows are sorted by it
    num_frames: int
    tensors: dict[str, Payload]
    scalars: dict[str, Any]

    @property
    def latent(self) -> Payload:
        """The posterior mean."""
        return self.tensors[LATENT]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def parquet_schema(*, moments: bool, store: Collection[str] = (), without: Collection[str] = ()) -> pa.Schema:
    """The file's columns: `id`, the tensor triplets, the first frame, then `SCALARS`. `store`: as `write.store`. `without`: paired videos
    that its rows do not have; their columns are null, so that all files of a build have the same ones.
    """
    columns = [pa.field("id", _TEXT, nullable=False)]
    for stored in stored_names(moments=moments, store=(*store, *without)):
        if not is_tensor(stored):
            columns.append(pa.field(stored, pa.binary(), nullable=False))
            continue
        name, null = tensor_column(stored), stored in without
        columns += [
            pa.field(f"{name}_bytes", pa.binary(), nullable=null),
            pa.field(f"{name}_shape", pa.list_(_INT), nullable=null),
            pa.field(f"{name}_dtype", _TEXT, nullable=null),
        ]
    return pa.schema(columns + [pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in SCALARS.items()])


def latent_row(
    clip: LatentClip,
    fingerprint: str,
    spec: dict[str, Any],
    *,
    moments: bool,
    store: Collection[str] = (),
    storage: str | None = None,
) -> LatentRow:
    """The clip as a row. `moments`, `store`: what the job stores; `storage`: how (`format.codec`), by default as the clip's type.

    Raises:
        BuildError: the id cannot name a tar member, the shape does not follow from the clip, or the clip has other tensors than the job
            stores.
    """
    if not ID_PATTERN.fullmatch(clip.id):
        raise BuildError(f"clip id {clip.id!r} must match [A-Za-z0-9_-]+", key=clip.sample.key, stage="write")
    _check_shape(clip, spec)
    arrays = {LATENT: clip.latent_CTHW, LOGVAR: clip.logvar_CTHW, I2V_COND: clip.cond_CTHW}
    tensors = {name: payload(array, storage or clip.dtype) for name, array in arrays.items() if array is not None}
    if clip.first_frame is not None:
        tensors[FIRST_FRAME] = image_payload(clip.first_frame)
    tensors |= {name: payload(clip.members[name], storage or clip.dtype) for name in sorted(clip.members)}
    if tuple(tensors) != (wanted := stored_names(moments=moments, store=store)):
        got = ", ".join(tensors)
        raise BuildError(
            f"clip {clip.id} has {got}, the job stores {', '.join(wanted)}", key=clip.sample.key, stage="write"
        )
    return LatentRow(
        id=clip.id,
        order=(clip.sample.index, clip.plan.index),
        num_frames=clip.num_frames,
        tensors=tensors,
        scalars=_scalars(clip, fingerprint),
    )


def _check_shape(clip: LatentClip, spec: dict[str, Any]) -> None:
    bucket = clip.plan.bucket
    lead = spec["lead_frames"]
    groups, rest = divmod(clip.num_frames - lead, spec["time_stride"])
    stride = spec["space_stride"]
    expected = (spec["latent_channels"], groups + lead, bucket.height // stride, bucket.width // stride)
    if rest or groups + lead < 1 or (bucket.frames and bucket.frames != clip.num_frames):
        wanted = f"{bucket.frames} frames" if bucket.frames else f"{spec['time_stride']}n+{lead} frames"
        raise BuildError(
            f"clip {clip.id} has {clip.num_frames} frames, expected {wanted}", key=clip.sample.key, stage="write"
        )
    for name, array in (
        ("latent", clip.latent_CTHW),
        ("log-variance", clip.logvar_CTHW),
        ("i2v_cond", clip.cond_CTHW),
        *clip.members.items(),
    ):
        wanted_shape = tensor_shape(name, expected)
        if array is not None and tuple(array.shape) != wanted_shape:
            raise BuildError(
                f"{name} of clip {clip.id} has shape {tuple(array.shape)}, expected {wanted_shape} "
                f"from {clip.num_frames} frames of {bucket.height}x{bucket.width}",
                key=clip.sample.key,
                stage="write",
            )


def _scalars(clip: LatentClip, fingerprint: str) -> dict[str, Any]:
    sample, info, plan = clip.sample, clip.info, clip.plan
    bucket = plan.bucket
    return {
        "caption": None if sample.caption is None else storable(sample.caption),
        "file_name": storable(sample.file_name or f"{sample.key}.{sample.video_ext}"),
        "media_type": "image" if info.is_image else "video",
        "width": bucket.width,
        "height": bucket.height,
        "num_frames": clip.num_frames,
        "duration_sec": clip.end_s - plan.start_s,
        "fps": plan.fps,
        "bucket": bucket.name,
        "variant": plan.variant,
        "source_uri": storable(sample.uri),
        "source_key": storable(sample.key),
        "source_hash": info.content_hash,
        "sample_index": sample.index if sample.source_index is None else sample.source_index,
        "clip_index": plan.clip_index,
        "clip_start_sec": plan.start_s,
        "clip_end_sec": clip.end_s,
        "clip_start_frame": plan.start,
        "crop": [plan.crop_top, plan.crop_left, bucket.height, bucket.width],
        "scaled_width": plan.scaled_width,
        "scaled_height": plan.scaled_height,
        "src_width": info.width,
        "src_height": info.height,
        "src_fps": info.fps,
        "codec": info.codec,
        "color_matrix": info.color_matrix,
        "color_range": info.color_range,
        "warnings": [*info.warnings, *sample.warnings],
        "captions": [storable(text) for _, text in sample.named_captions],
        "caption_names": [storable(name) for name, _ in sample.named_captions],
        "metadata": json.dumps(sample.metadata, ensure_ascii=True, sort_keys=True, allow_nan=False),
        "fingerprint": fingerprint,
    }


def readable_key(key: str) -> str:
    """The part of a sample's key that begins the ids of its rows."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-64:].strip("_") or "clip"


def storable(text: str) -> str:
    """`text` as valid Unicode: lone surrogates, which tar names and JSON escapes may hold, become visible escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

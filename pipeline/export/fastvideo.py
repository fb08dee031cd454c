"""FastVideo: Parquet files of raw or normalised latents with text embeddings, a folder for each bucket.

`{bucket}/part-NNNNNN.parquet` of at most 64 rows; its map loader reads a whole row group for a row, so row groups are 2 MiB. The reader
takes all tensor bytes for float32, whatever the type column says, and stacks rows of one batch, hence one bucket in a folder.

Where the output has `i2v_cond`, files of `wan` have the columns of its image-to-video schema: `first_frame_latent`, which it takes
normalised though it takes the latent raw; `clip_feature` and `pil_image` are empty, as its own preprocessing leaves them without CLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.export.models import LTX, WAN_21, WAN_22, Model
from pipeline.export.target import Target, tokens_only
from pipeline.export.texts import MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipeline.export.rows import Row
    from pipeline.export.target import Sample

ROW_GROUP_BYTES = 2 << 20
TEXT_TOKENS = 512
_TENSOR = (("bytes", pa.binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((f"{name}_{part}", kind) for name in ("vae_latent", "text_embedding") for part, kind in _TENSOR),
        ("file_name", pa.string()),
        ("caption", pa.string()),
        ("media_type", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("num_frames", pa.int64()),
        ("duration_sec", pa.float64()),
        ("fps", pa.float64()),
    ]
)
I2V_SCHEMA = pa.schema(
    [
        *SCHEMA,
        *(
            (f"{name}_{part}", kind)
            for name in ("clip_feature", "first_frame_latent", "pil_image")
            for part, kind in _TENSOR
        ),
    ]
)
MODELS = {
    "wan": Model("wan", (WAN_21, WAN_22), ("AutoencoderKLWan",), text_width=4096),
    "hunyuan": Model("hunyuan", ((16, 4, 8),), ("AutoencoderKLHunyuanVideo",)),
    "cosmos": Model("cosmos", (WAN_21, (16, 8, 8)), ("AutoencoderKLCosmos",)),
    "ltx2": Model("ltx2", (LTX,), ("AutoencoderKLLTX2Video",), normalize=True),
}


class FastVideo(Target):
    """See the module."""

    name = "fastvideo"
    models = MODELS
    needs_text = True
    shares_files = True
    part_rows = 64
    dtype = "float32"
    takes_conditions = ("wan",)
    stale = ("**/map_style_cache/file_info.pkl", "**/sharding_info_*_sp_groups_*_workers/shard_*.pkl")

    def notices(self) -> list[str]:
        """Of texts that its reader may cut off."""
        if self.texts is None or self.texts.lengths[1] <= TEXT_TOKENS or MASK in self.texts.names:
            return super().notices()
        return [
            *super().notices(),
            f"embeddings have up to {self.texts.lengths[1]} tokens; FastVideo cuts them at {TEXT_TOKENS} unless configured",
        ]

    def folder(self, row: Row) -> str:
        """One bucket, so that the rows of a batch have one shape."""
        return row.bucket

    def paths(self, row: Row) -> list[str]:
        """None: rows share files."""
        return []

    def part_path(self, folder: str, part: str) -> str:
        """The Parquet file."""
        return f"{folder}/part-{part}.parquet"

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """One file, row group by row group."""
        waiting: list[dict[str, Any]] = []
        size = 0
        schema = I2V_SCHEMA if self.others else SCHEMA
        with pq.ParquetWriter(place(part_path), schema, compression="zstd") as file:
            for sample in samples:
                waiting.append(record(sample))
                size += sum(len(value) for value in waiting[-1].values() if isinstance(value, bytes))
                if size >= ROW_GROUP_BYTES:
                    file.write_table(pa.Table.from_pylist(waiting, schema=schema))
                    waiting, size = [], 0
            if waiting:
                file.write_table(pa.Table.from_pylist(waiting, schema=schema))


def record(sample: Sample) -> dict[str, Any]:
    """One row of the file. `num_frames` is that of the latent, as FastVideo's own preprocessing writes it."""
    row, latent = sample.row, sample.latent
    text = tokens_only(sample.texts).to(torch.float32).contiguous()
    more: dict[str, Any] = {}
    if sample.cond is not None:
        more = {**_columns("first_frame_latent", sample.cond), **_columns("clip_feature"), **_columns("pil_image")}
    return {
        "id": row.id,
        **_columns("vae_latent", latent),
        **_columns("text_embedding", text),
        **more,
        "file_name": row.file_name,
        "caption": row.caption or "",
        "media_type": "video" if row.num_frames > 1 else "image",
        "width": row.width,
        "height": row.height,
        "num_frames": latent.shape[1],
        "duration_sec": row.duration_s,
        "fps": row.fps,
    }


def _columns(name: str, tensor: torch.Tensor | None = None) -> dict[str, Any]:
    """The three columns of a float32 tensor, empty without."""
    if tensor is None:
        return {f"{name}_bytes": b"", f"{name}_shape": [], f"{name}_dtype": ""}
    return {f"{name}_bytes": tensor.numpy().tobytes(), f"{name}_shape": list(tensor.shape), f"{name}_dtype": "float32"}

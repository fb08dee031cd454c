"""Megatron-Bridge (Wan): Energon tars with `{id}.pth` (latent), `{id}.pickle` (text) and `{id}.json`.

Latents are normalised float16 [C, T, H, W], texts have their true length [L, D]; the reader pads them to 512 and cuts longer ones off.
It packs samples into `seq_length` tokens: `tokens` in the JSON, and the greatest in the report. `energon prepare` makes the index.
"""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.export.models import WAN_21, Model
from pipeline.export.tar_part import saved, tar_file
from pipeline.export.target import Target, tokens_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipeline.export.rows import Row
    from pipeline.export.target import Sample

PATCH = (1, 2, 2)
MOST_TOKENS = 512
MOST_ABS = 1e3
MODELS = {"wan": Model("wan", (WAN_21,), ("AutoencoderKLWan",), normalize=True, text_width=4096)}


class MegatronBridge(Target):
    """See the module."""

    name = "megatron-bridge"
    models = MODELS
    needs_text = True
    shares_files = True
    part_rows = 1000
    dtype = "float16"
    stale = (".nv-meta/**/*", "*.tar.idx")

    def check(self, row: Row) -> None:
        """Raises InputError for a latent that patches of 1x2x2 do not divide."""
        if any(side % patch for side, patch in zip(row.shape[1:], PATCH, strict=True)):
            raise InputError(
                f"the latent of {row.id} is {'x'.join(map(str, row.shape[1:]))}; Megatron-Bridge cuts patches of 1x2x2: height and width "
                f"of videos must be multiples of {2 * self.source.spec['space_stride']}. Leave bucket {row.bucket} out with --where"
            )

    def folder(self, row: Row) -> str:
        """All rows together: samples of different shapes are packed."""
        return "."

    def paths(self, row: Row) -> list[str]:
        """None: rows share files."""
        return []

    def part_path(self, folder: str, part: str) -> str:
        """The tar."""
        return f"shard-{part}.tar"

    def numbers(self, row: Row) -> dict[str, int]:
        """Tokens of a sample, which `seq_length` must not be below."""
        return {"tokens": tokens(row)}

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """One tar."""
        with tar_file(place(part_path)) as add:
            for sample in samples:
                row = sample.row
                if (greatest := float(sample.latent.abs().max())) > MOST_ABS:
                    raise InputError(
                        f"the latent of {row.id} reaches {greatest:g}; Megatron-Bridge skips samples beyond {MOST_ABS:g} without a word"
                    )
                text = tokens_only(sample.texts).clone()
                if len(text) > MOST_TOKENS:
                    raise InputError(
                        f"the embedding of {row.id} has {len(text)} tokens; Megatron-Bridge cuts it off at {MOST_TOKENS}; cut it in the "
                        "table, or give the mask if the rest is padding"
                    )
                facts = {
                    "video_path": row.source,
                    "processed_frames": row.num_frames,
                    "processed_height": row.height,
                    "processed_width": row.width,
                    "caption": row.caption or "",
                    "deterministic_latents": True,
                    "model_version": "wan2.1" if self.model.name == "wan" else self.source.network,
                    "processing_mode": "video",
                    "tokens": tokens(row),
                    "fps": row.fps,
                }
                add(f"{row.id}.pth", saved(sample.latent))
                add(f"{row.id}.pickle", pickle.dumps(text))
                add(f"{row.id}.json", json.dumps(facts, sort_keys=True).encode())


def tokens(row: Row) -> int:
    """Patches of a row's latent."""
    _, frames, height, width = row.shape
    return (frames // PATCH[0]) * (height // PATCH[1]) * (width // PATCH[2])

"""LTX-2's trainer (and FastVideo's reader of the same tree): `.precomputed/latents` and `.precomputed/conditions`, a `.pt` file a row each.

Both files of a row have the same name below their folder; the trainer leaves out unpaired ones without a warning. Latents are normalised
bfloat16; `num_frames`, `height` and `width` beside them are those of the latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.errors import InputError
from pipeline.export.models import LTX, Model
from pipeline.export.tar_part import serialized
from pipeline.export.target import Target
from pipeline.export.texts import EMBEDDING, MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipeline.export.rows import Row, Source
    from pipeline.export.target import Sample
    from pipeline.export.texts import Texts

ROOT = ".precomputed"
AUDIO = "audio_embedding"
MODELS = {
    "ltx2": Model(
        "ltx2",
        (LTX,),
        ("AutoencoderKLLTX2Video",),
        normalize=True,
        notices=("embeddings of Gemma 3 (LTX-2, LTX-2.3) and of Gemma 4 (LTX-2.5) cannot replace each other",),
    )
}


class Ltx2(Target):
    """See the module."""

    name = "ltx2"
    models = MODELS
    needs_text = True
    dtype = "bfloat16"

    def __init__(self, source: Source, model: Model, texts: Texts | None) -> None:
        """Raises InputError also for embeddings of different lengths: the trainer stacks them."""
        super().__init__(source, model, texts)
        if texts is not None and len(set(texts.lengths)) > 1:
            least, most = texts.lengths
            raise InputError(
                f"{texts.label} has embeddings of {least} to {most} tokens; LTX-2 stacks them, so pad all to one length "
                "(its own preprocessing: on the left, to the tokenizer's maximum) and give the mask"
            )

    def folder(self, row: Row) -> str:
        """The bucket, below both trees."""
        return row.bucket

    def paths(self, row: Row) -> list[str]:
        """Latent and condition."""
        # Its reader takes a latent named `latent_X` for one of an older layout, with its condition elsewhere.
        name = f"row-{row.id}" if row.id.startswith("latent_") else row.id
        return [f"{ROOT}/{kind}/{row.bucket}/{name}.pt" for kind in ("latents", "conditions")]

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """Two files a row."""
        for sample in samples:
            latents, conditions = map(place, self.paths(sample.row))
            _, frames, height, width = sample.latent.shape
            facts = {"num_frames": frames, "height": height, "width": width, "fps": float(sample.row.fps)}
            latents.write_bytes(serialized({"latents": sample.latent, **facts}))
            embedding = sample.texts[EMBEDDING]
            mask = sample.texts.get(MASK, torch.ones(len(embedding)))
            condition = {"video_prompt_embeds": embedding, "prompt_attention_mask": mask.reshape(-1).to(torch.int64)}
            if AUDIO in sample.texts:
                condition["audio_prompt_embeds"] = sample.texts[AUDIO]
            conditions.write_bytes(serialized(condition))

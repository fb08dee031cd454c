"""musubi-tuner: a `.safetensors` file of the latent and one of the text for each row, a folder for each frame size.

The trainer finds items by their file names, `{id}_{start}-{frames}_{W}x{H}_{arch}.safetensors`, and computes each item's bucket from W x H
and the `resolution` of its configuration. Hence one size in a folder, and `dataset.toml` with that size. Tensors of a batch are stacked
under their key without type and size, except keys with `varlen_`.

Where the output has `i2v_cond`, latents of `wan` have it as `latents_image`, behind the four channels of the mask: 1 for the first frame.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from pipeline.errors import InputError
from pipeline.export.models import WAN_21, Model
from pipeline.export.target import Target, tokens_only
from pipeline.export.texts import EMBEDDING, MASK
from pipeline.export.values import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pipeline.export.rows import Row, Source
    from pipeline.export.target import Folder, Sample
    from pipeline.export.texts import Texts

CONFIG = "dataset.toml"
FORMAT_VERSION = "1.0.1"
CLIP = "clip_embedding"
FULL_NAMES = {"wan": "wan", "hv": "hunyuan_video"}
MODELS = {
    "wan": Model("wan", (WAN_21,), ("AutoencoderKLWan",), normalize=True, text_width=4096),
    "hv": Model(
        "hv",
        ((16, 4, 8),),
        ("AutoencoderKLHunyuanVideo",),
        text_width=4096,
        notices=("musubi's own cache of HunyuanVideo holds one sample of the posterior, this export holds its mean",),
    ),
}


class Musubi(Target):
    """See the module."""

    name = "musubi"
    models = MODELS
    needs_text = True
    dtype = "bfloat16"
    takes_conditions = ("wan",)

    def __init__(self, source: Source, model: Model, texts: Texts | None) -> None:
        """Raises InputError also where HunyuanVideo's mask or CLIP embedding is missing, or a model of the user's own is asked for."""
        super().__init__(source, model, texts)
        if model.name not in FULL_NAMES:
            raise InputError(
                f"--as: musubi reads the caches of its own models only; expected one of {', '.join(FULL_NAMES)}"
            )
        if model.name == "hv":
            self.dtype = "float16"  # its default type for this model
            lacking = [name for name in (MASK, CLIP) if texts is not None and name not in texts.names]
            if texts is not None and (lacking or len(set(texts.lengths)) > 1):
                raise InputError(
                    f"{texts.label}: musubi's HunyuanVideo takes embeddings padded to one length, {MASK} and {CLIP}; "
                    f"this table lacks {', '.join(lacking) or 'one length: ' + str(texts.lengths)}"
                )

    def folder(self, row: Row) -> str:
        """One frame size."""
        return f"{row.width}x{row.height}"

    def paths(self, row: Row) -> list[str]:
        """Latent and text."""
        base, arch = f"{self.folder(row)}/{row.id}", self.model.name
        size = f"{row.width:04d}x{row.height:04d}"
        return [f"{base}_00000-{row.num_frames:03d}_{size}_{arch}.safetensors", f"{base}_{arch}_te.safetensors"]

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """Two files a row."""
        for sample in samples:
            row = sample.row
            latent_path, text_path = map(place, self.paths(row))
            facts = {"architecture": FULL_NAMES[self.model.name], "format_version": FORMAT_VERSION}
            grid = "x".join(map(str, sample.latent.shape[1:]))
            size = {"width": str(row.width), "height": str(row.height), "frame_count": str(row.num_frames)}
            tensors = {f"latents_{grid}_{dtype_name(sample.latent)}": sample.latent}
            if sample.cond is not None:
                masked = _with_mask(sample.cond, self.source.spec["time_stride"])
                tensors[f"latents_image_{grid}_{dtype_name(masked)}"] = masked
            latent_path.write_bytes(save(tensors, metadata={**facts, **size}))
            text_path.write_bytes(save(self._texts(sample), metadata={**facts, "caption1": row.caption or ""}))

    def _texts(self, sample: Sample) -> dict[str, Any]:
        if self.model.name == "wan":
            tokens = tokens_only(sample.texts)
            return {f"varlen_t5_{dtype_name(tokens)}": tokens.contiguous()}
        embedding, clip = sample.texts[EMBEDDING], sample.texts[CLIP]
        return {
            f"llm_{dtype_name(embedding)}": embedding,
            "llm_mask": sample.texts[MASK].reshape(-1).to(torch.int64),
            f"clipL_{dtype_name(clip)}": clip.reshape(-1),
        }

    def finish(self, folders: Sequence[Folder], directory: Path) -> dict[str, bytes | None]:
        """`dataset.toml`: a dataset for each size, with the `resolution` that gives its latents' shape."""
        lines = [
            "# Written by lathe export. Change batch_size and num_repeats as you like in a copy.",
            "[general]",
            "batch_size = 1",
            "",
        ]
        for folder in folders:
            place = json.dumps(str((directory / folder.name).absolute()))
            width, height = folder.name.split("x")
            lines += [
                "[[datasets]]",
                f"resolution = [{width}, {height}]",
                "enable_bucket = false",
                f"video_directory = {place}  # holds no videos: latents and texts are cached already",
                f"cache_directory = {place}",
                "target_frames = [1]  # of caching, which does not happen here; the frames of each latent are in its name",
                "",
            ]
        return {CONFIG: "\n".join(lines).encode()}


def _with_mask(cond_CTHW: torch.Tensor, time_stride: int) -> torch.Tensor:
    """The condition behind a channel for each video frame of a latent frame, 1 where the frame is given: all of the first latent frame."""
    mask = torch.zeros((time_stride, *cond_CTHW.shape[1:]), dtype=cond_CTHW.dtype)
    mask[:, 0] = 1
    return torch.cat([mask, cond_CTHW])

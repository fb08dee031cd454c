"""NeMo AutoModel: a `.meta` file (`torch.save`) a row, with JSON lists of them, a cache directory for each number of frames.

`{frames}f/metadata.json` names the lists `{frames}f/metadata_shard_NNNNNN.json`; their `cache_file` are absolute. The trainer's buckets
know width and height but not frames, and it concatenates, hence a directory for each number of frames and texts of one length.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.export.models import CUSTOM, WAN_21, Model
from pipeline.export.tar_part import serialized
from pipeline.export.target import Target, tokens_only
from pipeline.export.texts import EMBEDDING, MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from pipeline.export.rows import Row, Source
    from pipeline.export.target import Folder, Sample
    from pipeline.export.texts import Texts

INDEX = "metadata.json"
WAN_TOKENS = 226
OPTIONAL = ("text_mask", "text_embeddings_2", "text_mask_2", "image_embeds", "audio_text_embeddings")
MODELS = {
    "wan": Model("wan", (WAN_21,), ("AutoencoderKLWan",), normalize=True, text_width=4096, text_length=WAN_TOKENS),
    # The 14B models of Wan 2.2 use the VAE of Wan 2.1; AutoModel has no model for the VAE of Wan 2.2.
    "wan22": Model("wan22", (WAN_21,), (), normalize=True, text_width=4096, text_length=WAN_TOKENS),
}


class AutoModel(Target):
    """See the module."""

    name = "automodel"
    models = MODELS
    needs_text = True
    dtype = "float16"
    absolute = True

    def __init__(self, source: Source, model: Model, texts: Texts | None) -> None:
        """Raises InputError also for embeddings that cannot have one length."""
        super().__init__(source, model, texts)
        if texts is None or model.text_length is not None:
            return
        if len(set(texts.lengths)) > 1:
            least, most = texts.lengths
            raise InputError(
                f"{texts.label} has embeddings of {least} to {most} tokens; AutoModel concatenates them, pad to one"
            )

    def folder(self, row: Row) -> str:
        """The cache directory."""
        return f"{row.num_frames}f"

    def paths(self, row: Row) -> list[str]:
        """The cache file."""
        return [f"{self.folder(row)}/{row.width}x{row.height}/{row.id}.meta"]

    def part_path(self, folder: str, part: str) -> str:
        """A list of cache files."""
        return f"{folder}/metadata_shard_{part}.json"

    def entry(self, row: Row, directory: Path) -> dict[str, Any]:
        """What the list says of a row."""
        return {
            "cache_file": str((directory / self.paths(row)[0]).absolute()),
            "video_path": row.source,
            "bucket_resolution": [row.width, row.height],
            "original_resolution": [row.width, row.height],
            "num_frames": row.num_frames,
            "prompt": row.caption or "",
            "bucket_id": None,
            "aspect_ratio": row.width / row.height,
            "pixels": row.width * row.height,
            "model_type": self.model.name,
        }

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """One file a row; tensors have a leading 1."""
        for sample in samples:
            row = sample.row
            optional = {name: sample.texts[name].unsqueeze(0) for name in OPTIONAL if name in sample.texts}
            content = {
                "video_latents": sample.latent.unsqueeze(0),
                "text_embeddings": self._text(sample).unsqueeze(0),
                **optional,
                "first_frame": None,
                "original_resolution": (row.width, row.height),
                "bucket_resolution": (row.width, row.height),
                "bucket_id": None,
                "aspect_ratio": row.width / row.height,
                "num_frames": row.num_frames,
                "prompt": row.caption or "",
                "video_path": row.source,
                "deterministic_latents": True,
                "model_version": {"wan": "wan2.1", "wan22": "wan2.2", CUSTOM: self.source.network}[self.model.name],
                "processing_mode": "video",
                "model_type": self.model.name,
            }
            place(self.paths(row)[0]).write_bytes(serialized(content))

    def _text(self, sample: Sample) -> Tensor:
        """[L, D]: padded with zeros to the model's length, as Wan's pipeline has it; as it is for other models."""
        length = self.model.text_length
        if length is None:
            return sample.texts[EMBEDDING]
        tokens = tokens_only(sample.texts)
        if len(tokens) > length:
            told = "" if MASK in sample.texts else "; if these are padding, give the mask"
            raise InputError(
                f"the embedding of {sample.row.id} has {len(tokens)} tokens, AutoModel's {self.model.name} takes {length}{told}"
            )
        return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))

    def finish(self, folders: Sequence[Folder], directory: Path) -> dict[str, bytes | None]:
        """`metadata.json` of each cache directory."""
        found: dict[str, bytes | None] = {
            path.relative_to(directory).as_posix(): None for path in directory.glob(f"*f/{INDEX}")
        }
        for folder in folders:
            lists = [path.rpartition("/")[2] for path in folder.part_files]
            facts = {
                "processor": self.model.name,
                "model_name": self.source.network,
                "model_type": self.model.name,
                "total_items": folder.rows,
                "num_shards": len(lists),
                "shards": lists,
            }
            found[f"{folder.name}/{INDEX}"] = json.dumps(facts, indent=2).encode()
        return found

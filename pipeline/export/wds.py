"""WebDataset tars with members of the user's choice, for trainers that read plain tars (FastGen, TurboDiffusion, own ones).

A member is `CONTENT=SUFFIX`: `latent=latent.pt` puts the latent into `{id}.latent.pt`. The last extension decides the form: `.pt` and
`.pth` (`torch.save` of a plain tensor), `.npy`, `.json`, `.txt`, and `.webp`, `.png` of the first frame.
Paired videos have the content of their name: `control=control.pt`.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.errors import ConfigError, InputError
from pipeline.export.tar_part import saved, tar_file
from pipeline.export.target import Target, tokens_only
from pipeline.export.texts import EMBEDDING
from pipeline.export.values import DTYPES, converted
from pipeline.format.stored import FIRST_FRAME, I2V_COND, LATENT, LOGVAR, OPTIONAL, STORED
from pipeline.format.tensors import image_suffix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from pipeline.export.models import Model
    from pipeline.export.rows import Row, Source
    from pipeline.export.target import Sample
    from pipeline.export.texts import Texts

TENSORS = ("pt", "pth", "npy")
FORMS = {
    **dict.fromkeys(("latent", "logvar", "text", I2V_COND), TENSORS),
    FIRST_FRAME: ("webp", "png"),
    "caption": ("txt", "json"),
    "captions": ("json",),
    "metadata": ("json",),
}
DEFAULT = ("latent=latent.pt", "caption=txt", "metadata=json")


class Wds(Target):
    """See the module."""

    name = "wds"
    shares_files = True
    part_rows = 1000
    stale = ("**/.nv-meta/**/*", "**/*.tar.idx")

    def __init__(
        self,
        source: Source,
        model: Model,
        texts: Texts | None,
        *,
        members: Sequence[str] = DEFAULT,
        dtype: str | None = None,
        moments: bool = False,
    ) -> None:
        """`members` as in the module; `dtype` of latents and texts, None for the stored one; `moments`: whether rows have a log-variance.

        Raises:
            ConfigError: members that cannot be written so.
        """
        super().__init__(source, model, texts)
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype = dtype
        paired = [name for name in source.stored if name not in STORED]
        self.members = [_member(text, paired) for text in members]
        suffixes = [suffix for _, suffix in self.members]
        if twice := [suffix for suffix in suffixes if suffixes.count(suffix) > 1]:
            raise ConfigError(f"--member: {twice[0]} is given twice")
        contents = {content for content, _ in self.members}
        if "logvar" in contents and not moments:
            raise ConfigError("--member logvar: the output has no log-variance; encode with --moments")
        for name in (name for name in OPTIONAL if name in contents):
            if name not in source.stored:
                raise ConfigError(f"--member {name}: the output does not store it; encode with --store {name}")
        if "logvar" in contents and model.normalize:
            raise ConfigError("--member logvar: the log-variance is of raw latents; use --normalize none")
        if asked := [content for content in contents if content.startswith("text")]:
            if texts is None:
                raise InputError(
                    f"--member {asked[0]}: give the embeddings as --sidecar SET or --text-embeddings TABLE.parquet, see docs/export.md"
                )
            if lacking := {content.partition(".")[2] or EMBEDDING for content in asked} - set(texts.names):
                raise InputError(f"{texts.label} has {', '.join(texts.names)}, not {', '.join(sorted(lacking))}")

    @property
    def others(self) -> tuple[str, ...]:
        """Those of the members."""
        contents = {content for content, _ in self.members}
        stored = [name for name in self.source.stored if name not in (LATENT, LOGVAR)]
        return tuple(name for name in stored if name in contents)

    def settings(self) -> dict[str, Any]:
        """Also the members."""
        return {**super().settings(), "members": self.members}

    def folder(self, row: Row) -> str:
        """The bucket, so that the rows of a tar have one shape."""
        return row.bucket

    def paths(self, row: Row) -> list[str]:
        """None: rows share files."""
        return []

    def part_path(self, folder: str, part: str) -> str:
        """The tar."""
        return f"{folder}/{part}.tar"

    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """One tar."""
        with tar_file(place(part_path)) as add:
            for sample in samples:
                for content, suffix in self.members:
                    add(f"{sample.row.id}.{suffix}", self._bytes(sample, content, suffix))

    def _bytes(self, sample: Sample, content: str, suffix: str) -> bytes:
        row, form = sample.row, suffix.rpartition(".")[2]
        if content == "caption":
            caption = row.caption or ""
            return caption.encode() if form == "txt" else json.dumps({"caption": caption}).encode()
        if content == "captions":
            return json.dumps({"captions": row.captions, "names": row.caption_names}).encode()
        if content == "metadata":
            return json.dumps(described(row), sort_keys=True).encode()
        if content == FIRST_FRAME and sample.first_frame is not None:
            return _image(sample.first_frame, form)
        tensor = self._tensor(sample, content)
        if form != "npy":
            return saved(tensor)
        if tensor.dtype == DTYPES["bfloat16"]:
            raise InputError(
                f"--member {content}={suffix}: numpy has no bfloat16; use --dtype float32 or float16, or .pt"
            )
        out = io.BytesIO()
        np.save(out, tensor.numpy())
        return out.getvalue()

    def _tensor(self, sample: Sample, content: str) -> Tensor:
        if content == "latent":
            return sample.latent
        if content == I2V_COND and sample.cond is not None:
            return sample.cond
        if content in sample.members:
            return sample.members[content]
        if content == "logvar":
            if sample.logvar is None:
                raise InputError(f"row {sample.row.id} has no log-variance; encode with --moments")
            return converted(sample.logvar, self.dtype, None, sample.row.id)
        name = content.partition(".")[2]
        tensor = tokens_only(sample.texts) if not name else sample.texts[name]
        return tensor.to(DTYPES[self.dtype]) if self.dtype is not None and tensor.is_floating_point() else tensor


def _image(data: bytes, form: str) -> bytes:
    """The image file as a WebP or PNG, with the same pixels."""
    if image_suffix(data[:16]) == form:
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.save(out, form, lossless=True)
    return out.getvalue()


def described(row: Row) -> dict[str, Any]:
    """Facts of a row for a JSON member; its own metadata under `metadata`."""
    names = (
        "id",
        "bucket",
        "num_frames",
        "width",
        "height",
        "fps",
        "duration_s",
        "caption",
        "captions",
        "caption_names",
        "file_name",
        "source",
        "metadata",
    )
    return {**{name: getattr(row, name) for name in names}, "shape": list(row.shape)}


def _member(text: str, paired: Sequence[str]) -> tuple[str, str]:
    content, equals, suffix = text.partition("=")
    known = {**FORMS, **dict.fromkeys(paired, TENSORS)}
    forms = known.get(content.partition(".")[0])
    if forms is None or not equals or ("." in content and not content.startswith("text.")):
        raise ConfigError(
            f"--member: expected CONTENT=SUFFIX with {', '.join(known)} or text.NAME as content, got {text!r}"
        )
    if suffix.rpartition(".")[2] not in forms or suffix.startswith(".") or "/" in suffix:
        raise ConfigError(
            f"--member {text}: expected a suffix that ends in {', '.join(forms)}, such as {content.partition('.')[0]}.{forms[0]}"
        )
    return content, suffix

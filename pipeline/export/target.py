"""What a target of an export is: where a row's files lie, how they are written, what else the trainer reads.

An export is written in parts: rows of one folder that are recorded together. A target's files are named before they are written, so
that a killed export can be cleaned up (`journal`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.errors import InputError
from pipeline.export.texts import EMBEDDING, MASK
from pipeline.format.stored import I2V_COND, STORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from pipeline.export.models import Model
    from pipeline.export.rows import Row, Source
    from pipeline.export.texts import Texts


@dataclass(frozen=True, slots=True)
class Sample:
    """A row with its tensors. `latent`, `logvar`, `cond`: `CTHW` as the target wants them; `texts`: the tensors of its text by name;
    `first_frame`: an image file; `members`: paired videos by name, normalised as the latent, masks as they are.
    """

    row: Row
    latent: Tensor
    logvar: Tensor | None = None
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    cond: Tensor | None = None
    first_frame: bytes | None = field(default=None, repr=False)
    members: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Folder:
    """A finished folder of an export: its rows, video frames and index files, over all parts."""

    name: str
    rows: int
    part_files: tuple[str, ...]


class Target(ABC):
    """Format of one trainer. Paths are relative to the export's directory and use `/`."""

    name: ClassVar[str]
    models: ClassVar[dict[str, Model]] = {}
    needs_text: ClassVar[bool] = False
    shares_files: ClassVar[bool] = False  # rows share a file: to drop one, the file is written again without it
    part_rows: ClassVar[int] = 256
    part_bytes: ClassVar[int] = 1 << 30
    dtype: str | None = None  # of latents; None: as stored
    absolute: ClassVar[bool] = False  # files name others by absolute path, so the directory cannot be moved
    takes_conditions: ClassVar[
        tuple[str, ...]
    ] = ()  # models whose rows have `i2v_cond`, normalised by the network's constants
    stale: ClassVar[tuple[str, ...]] = ()  # patterns of caches that the trainer makes and would trust after a change

    def __init__(self, source: Source, model: Model, texts: Texts | None) -> None:
        """Raises InputError or ConfigError if rows of `source`, or `texts`, are not what `model` takes."""
        self.source, self.model, self.texts = source, model, texts
        if self.needs_text and texts is None:
            raise InputError(
                f"{self.name} trains on text embeddings, which this output does not have; give them as "
                "--sidecar SET (`lathe embed` makes one) or --text-embeddings TABLE.parquet, see docs/export.md"
            )
        if texts is not None and model.text_width not in (None, texts.width):
            raise InputError(
                f"{texts.label} has embeddings {texts.width} wide; the model {model.name} takes {model.text_width}"
            )

    def settings(self) -> dict[str, Any]:
        """Settings that all exports into one directory must share, JSON-ready."""
        others = {"others": list(self.others)} if self.others else {}
        return {"normalize": self.model.normalize, "dtype": self.dtype, **others}

    @property
    def others(self) -> tuple[str, ...]:
        """What rows of the export have besides the latent, names of `format.stored`."""
        takes = self.model.name in self.takes_conditions and I2V_COND in self.source.stored
        return (I2V_COND,) if takes and self.source.has_constants else ()

    @property
    def normalizes_conditions(self) -> bool:
        """Whether conditions are normalised by the network's constants."""
        return self.model.name in self.takes_conditions or self.model.normalize

    def notices(self) -> list[str]:
        """What the user should know of this export."""
        left = [name for name in self.source.stored if name not in (*STORED, *self.others)]
        hint = f"paired videos are exported by wds, with --member {left[0]}={left[0]}.pt" if left else ""
        found = [f"without {', '.join(left)}: {hint}"] if left else []
        if self.model.name not in self.takes_conditions or I2V_COND not in self.source.stored:
            return found
        if self.source.has_constants:
            return [
                *found,
                "rows have i2v_cond; image-to-video training of Wan 2.1 needs CLIP features as well, Wan 2.2 does not",
            ]
        return [*found, f"without i2v_cond, which {self.name} takes normalised: {self.source.network} has no constants"]

    def check(self, row: Row) -> None:  # noqa: B027 - most targets take every row
        """Raises InputError for a row that the trainer could not read."""

    @abstractmethod
    def folder(self, row: Row) -> str:
        """Folder of a row. Rows of one folder make parts together."""

    @abstractmethod
    def paths(self, row: Row) -> list[str]:
        """Files that belong to the row alone."""

    def part_path(self, folder: str, part: str) -> str:
        """File that the rows of a part share; empty if there is none."""
        return ""

    def entry(self, row: Row, directory: Path) -> dict[str, Any] | None:
        """What the index of a part says of a row, JSON-ready; None if the target has no such index."""
        return None

    @abstractmethod
    def write(self, samples: Iterator[Sample], part_path: str, place: Callable[[str], Path]) -> None:
        """Writes the files of a part. `place` gives the local path under which one of them is to be written."""

    def part_index(self, entries: Sequence[Any]) -> bytes:
        """Content of a part's file that is made of `entry` alone, for targets that have one and do not share files."""
        return json.dumps(entries, indent=1).encode()

    def finish(self, folders: Sequence[Folder], directory: Path) -> dict[str, bytes | None]:
        """Files over all parts, by path: their content, or None to remove one."""
        return {}

    def numbers(self, row: Row) -> dict[str, int]:
        """Numbers of a row whose greatest values the user needs to configure the trainer."""
        return {}


def tokens_only(texts: Mapping[str, Tensor]) -> Tensor:
    """The embedding [L, D] without padding: its tokens where `mask` is not 0, all of it without a mask."""
    embedding = texts[EMBEDDING]
    mask = texts.get(MASK)
    return embedding if mask is None else embedding[mask.reshape(-1).bool()]

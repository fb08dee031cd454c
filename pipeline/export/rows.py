"""Rows of a snapshot as an export reads them: facts without tensors in a fixed order, and the tensors of chosen rows.

`Rows` is the interface; `pipeline.export.dataset` implements it over the loader's dataset.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.format.stored import LATENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows come from. `spec`: the network's facts as file metadata has them; `applied`: values are normalised already."""

    uuid: str
    uri: str
    snapshot: int
    spec: dict[str, Any]
    network_class: str | None = None  # `_class_name` of a diffusers network
    applied: bool = False
    where: str | None = None
    stored: tuple[str, ...] = (LATENT,)  # names of `format.stored`

    @property
    def network(self) -> str:
        """Name of the network."""
        return str(self.spec["network"])

    @property
    def has_constants(self) -> bool:
        """Whether the network has constants to normalise by."""
        return any(self.spec.get(name) is not None for name in ("scale", "shift", "mean", "std"))

    @property
    def shape_facts(self) -> tuple[int, int, int]:
        """Latent channels, frames per latent frame, pixels per latent pixel."""
        return self.spec["latent_channels"], self.spec["time_stride"], self.spec["space_stride"]


@dataclass(frozen=True, slots=True)
class Row:
    """Facts of one latent. `shape`: C, T, H, W; `width`, `height`, `num_frames` in pixels and video frames."""

    id: str
    bucket: str
    shape: tuple[int, int, int, int]
    num_frames: int
    width: int
    height: int
    fps: float
    duration_s: float
    caption: str | None
    file_name: str = ""
    source: str = ""
    fingerprint: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    captions: tuple[str, ...] = ()  # all, `caption` first
    caption_names: tuple[str, ...] = ()
    place: tuple[int, int] = field(default=(0, 0), compare=False)  # number of its data file, which of its rows

    @property
    def version(self) -> str:
        """Digest of what an export copies of the row. Ids cover source, clip and settings; caption and metadata may change beside them."""
        facts: list[Any] = [self.id, self.fingerprint, self.caption, self.metadata]
        if len(self.captions) > 1:
            facts += [self.captions, self.caption_names]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Latent:
    """Tensors `CTHW` of one row in their stored type. `logvar`: only where the output has moments. `cond`, `first_frame` (an image file),
    `members` (paired videos by name): where they were asked for.
    """

    mean: Tensor
    logvar: Tensor | None = None
    cond: Tensor | None = None
    first_frame: bytes | None = field(default=None, repr=False)
    members: dict[str, Tensor] = field(default_factory=dict)


class Rows(Protocol):
    """Rows of one snapshot. Both methods may be called again and give the same order."""

    source: Source

    def __iter__(self) -> Iterator[Row]:
        """Every row once, bucket after bucket."""
        ...

    def latents(self, rows: Sequence[Row], others: Sequence[str] = ()) -> Iterable[Latent]:
        """Latents of `rows`, in their order; at most a few are in memory at a time. `others`: what else of `Source.stored` is wanted."""
        ...

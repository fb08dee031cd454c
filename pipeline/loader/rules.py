"""Batch rules: how many latents of a bucket make one global batch, and which world sizes can share it.

A *global batch* is what all data-parallel ranks read in one step. Its size never depends on the number of ranks; rank r of W takes the
r-th of W equal parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

Grid = tuple[int, int, int]
"""Frames, height, width of a latent, or of a patch of it."""


@dataclass(frozen=True, slots=True)
class BucketShare:
    """Latents of a global batch of one bucket, and the fraction of the bucket's rows that an epoch uses."""

    size: int
    keep: float = 1.0


@dataclass(frozen=True, slots=True)
class PerBucket:
    """A number of latents for each bucket by name (`17x256x256`); buckets that are not named are left out."""

    shares: Mapping[str, BucketShare]

    def share(self, bucket: str, grid: Grid) -> BucketShare | None:
        """None: the bucket is not used."""
        return self.shares.get(bucket)


@dataclass(frozen=True, slots=True)
class Same:
    """The same number of latents whatever the bucket."""

    size: int

    def share(self, bucket: str, grid: Grid) -> BucketShare:
        """Of every bucket."""
        return BucketShare(self.size)


@dataclass(frozen=True, slots=True)
class Tokens:
    """As many latents as `budget` tokens hold, per global batch. `patch`: latent frames, rows and columns of one token.

    `multiple`: sizes are rounded down to a multiple of it; give the largest number of ranks that will share a batch.
    """

    budget: int
    patch: Grid = (1, 2, 2)
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_positive("Tokens.budget", self.budget)
        _check_positive("Tokens.multiple", self.multiple)
        for size in self.patch:
            _check_positive("Tokens.patch", size)

    def share(self, bucket: str, grid: Grid) -> BucketShare:
        """Raises ConfigError where not even `multiple` latents fit."""
        tokens = tokens_of(grid, self.patch)
        size = self.budget // tokens // self.multiple * self.multiple
        if size < 1:
            raise ConfigError(
                f"batch: {self.multiple} latents of bucket {bucket} have {tokens * self.multiple} tokens, the budget is {self.budget}; "
                "raise Tokens.budget or filter the bucket out"
            )
        return BucketShare(size)


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences of at most `seq_len` tokens of whole latents of any bucket, `sequences` of them a global batch.

    Latents are placed first-fit, within windows of `window` rows of the order. `pad_multiple`: each sequence is padded to a multiple.
    """

    seq_len: int
    sequences: int = 1
    patch: Grid = (1, 2, 2)
    pad_multiple: int = 1
    window: int = field(default=1024)

    def __post_init__(self) -> None:
        for name in ("seq_len", "sequences", "pad_multiple", "window"):
            _check_positive(f"Pack.{name}", getattr(self, name))
        if self.seq_len % self.pad_multiple:
            raise ConfigError(
                f"Pack.seq_len: expected a multiple of pad_multiple {self.pad_multiple}, got {self.seq_len}"
            )


BatchRule = Same | PerBucket | Tokens | Pack


def tokens_of(grid: Grid, patch: Grid) -> int:
    """Tokens of a latent; each side is rounded up to whole patches."""
    frames, height, width = (-(-size // step) for size, step in zip(grid, patch, strict=True))
    return frames * height * width


def parse_rule(batch: Any) -> BatchRule:
    """`batch` of the loader: a number, a mapping of bucket to a number or (number, keep probability), `Tokens` or `Pack`.

    Raises:
        ConfigError: none of these, or a number out of range.
    """
    if isinstance(batch, Same | PerBucket | Tokens | Pack):
        return batch
    if isinstance(batch, int) and not isinstance(batch, bool):
        _check_positive("batch", batch)
        return Same(batch)
    if isinstance(batch, Mapping):
        if not batch:
            raise ConfigError("batch: expected at least one bucket, got an empty mapping")
        return PerBucket({name: _share(name, value) for name, value in batch.items()})
    raise ConfigError(
        f"batch: expected a number, a mapping of bucket to number, Tokens(…) or Pack(…), got {type(batch).__name__}"
    )


def check_world(size: int, world: int, what: str) -> None:
    """Raises ConfigError where `world` ranks cannot share a global batch of `size` equally; names the worlds that can."""
    if size % world:
        worlds = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            f"batch: {what} has {size} latents, which {world} ranks cannot share equally; "
            f"expected a multiple of {world} (worlds that divide {size}: {worlds})"
        )


def unknown_buckets(rule: BatchRule, known: Iterable[str]) -> list[str]:
    """Buckets that the rule names and no dataset has."""
    return sorted(set(rule.shares) - set(known)) if isinstance(rule, PerBucket) else []


def _share(name: str, value: Any) -> BucketShare:
    size, keep = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 1.0)
    if not isinstance(size, int) or isinstance(size, bool):
        raise ConfigError(f"batch: bucket {name}: expected a number or (number, keep probability), got {value!r}")
    _check_positive(f"batch: bucket {name}", size)
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"batch: bucket {name}: expected a keep probability in (0, 1], got {keep}")
    return BucketShare(size, float(keep))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: expected at least 1, got {value}")

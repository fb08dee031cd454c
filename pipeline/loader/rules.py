"""Batch rules: how many latents of a bucket make one global batch, and which world sizes can share it.

A *global batch* is what all data-parallel ranks read in one step. Its size never depends on the number of ranks; rank r of W takes the
r-th of W equal parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.loader.arguments import integer, number

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
        for name in ("budget", "multiple"):
            object.__setattr__(self, name, integer(f"Tokens.{name}", getattr(self, name), 1))
        object.__setattr__(self, "patch", _grid("Tokens.patch", self.patch))

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
            object.__setattr__(self, name, integer(f"Pack.{name}", getattr(self, name), 1))
        object.__setattr__(self, "patch", _grid("Pack.patch", self.patch))
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
    if isinstance(batch, Mapping):
        return _per_bucket(batch)
    if not hasattr(batch, "__index__"):
        raise ConfigError(
            f"batch: expected a number, a mapping of bucket to number, Tokens(…) or Pack(…), got {type(batch).__name__}"
        )
    return Same(integer("batch", batch, 1))


def check_world(size: int, world: int, what: str, multiple: int | None = None) -> None:
    """Raises ConfigError where `world` ranks cannot share a global batch of `size` equally; names the worlds that can.

    `what`: the part of the rule with its size, as a sentence. `multiple`: value of `Tokens.multiple` with which they can, if there is one.
    """
    if size % world:
        worlds = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        wanted = f"expected a multiple of {world}" if multiple is None else f"give Tokens(…, multiple={multiple})"
        raise ConfigError(
            f"batch: {what}, which {world} ranks cannot share equally; {wanted} (worlds that divide {size}: {worlds})"
        )


def unknown_buckets(rule: BatchRule, known: Iterable[str]) -> list[str]:
    """Buckets that the rule names and no dataset has."""
    return sorted(set(rule.shares) - set(known)) if isinstance(rule, PerBucket) else []


def _per_bucket(batch: Mapping[Any, Any]) -> PerBucket:
    if not batch:
        raise ConfigError("batch: expected at least one bucket, got an empty mapping")
    found: dict[str, BucketShare] = {}
    for given, value in batch.items():
        name = str(given).removeprefix("v")  # as folders and columns name buckets
        if name in found:
            raise ConfigError(f"batch: bucket {name} is given twice, as {name} and as v{name}; expected it once")
        found[name] = _share(name, value)
    return PerBucket(found)


def _share(name: str, value: Any) -> BucketShare:
    pair = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 1.0)
    try:
        size, keep = integer("size", pair[0], 1), number("keep", pair[1], 0.0, 1.0)
    except ConfigError:
        raise ConfigError(
            f"batch: bucket {name}: expected a number >= 1, or with a keep probability (number, keep), got {value!r}"
        ) from None
    if not keep:
        raise ConfigError(f"batch: bucket {name}: expected a keep probability in (0, 1], got {keep}")
    return BucketShare(size, keep)


def _grid(name: str, value: Any) -> Grid:
    sides = tuple(value) if isinstance(value, tuple | list) else ()
    if len(sides) != 3:
        raise ConfigError(f"{name}: expected (frames, height, width), got {value!r}")
    frames, height, width = (integer(name, side, 1) for side in sides)
    return frames, height, width

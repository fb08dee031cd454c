"""One epoch of one dataset as a sequence of global batches: a pure function of row counts, rule, seed and epoch number.

Per bucket: files are permuted, rows are shuffled within windows of `window` files, global batches are cut; then the batches of all
buckets are put in random order. Rows are numbers: row i of a bucket, counted over its files in the snapshot's order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.draws import key_of, ordered_by, permutation, raw
from pipeline.loader.rules import Pack, tokens_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.loader.rules import BatchRule, BucketShare, Grid


@dataclass(frozen=True, slots=True)
class BucketRows:
    """Rows of one bucket of a dataset. `counts`: rows of each of its files, int64; `grid`: frames, height, width of its latents."""

    grid: Grid
    counts: np.ndarray = field(repr=False)

    @property
    def total(self) -> int:
        """Rows in all."""
        return int(self.counts.sum())


class RowsOfBucket(NamedTuple):
    """Rows of one bucket in a batch, int64."""

    bucket: str
    rows: np.ndarray


class Sequence(NamedTuple):
    """A packed sequence: rows with their buckets, in the order they are laid out, and their tokens together."""

    buckets: list[str]
    rows: np.ndarray
    tokens: int


class _Packed(NamedTuple):
    """The same with numbers of buckets: ten million rows have no space for names."""

    buckets: np.ndarray
    rows: np.ndarray
    tokens: int


def file_window(shuffle: str) -> int | None:
    """`window:64` -> 64 files; `full` -> all files; `none` -> None.

    Raises:
        ConfigError: none of these.
    """
    if shuffle == "none":
        return None
    if shuffle == "full":
        return 1 << 62
    word, _, number = shuffle.partition(":")
    if word != "window" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"shuffle: expected none, full or window:N with N >= 1 files, got {shuffle!r}")
    return int(number)


def shuffled_rows(counts: np.ndarray, window: int | None, key: int) -> np.ndarray:
    """All rows of files with `counts` rows: files permuted, rows shuffled within windows of so many files. int32 (int64 above 2^31)."""
    total = int(counts.sum())
    kind = np.int32 if total < 1 << 31 else np.int64
    if window is None:
        return np.arange(total, dtype=kind)
    files = permutation(key_of(key, "files"), len(counts))
    starts = (np.cumsum(counts) - counts)[files]
    sizes = counts[files]
    rows = np.repeat((starts - (np.cumsum(sizes) - sizes)).astype(kind), sizes)
    rows += np.arange(total, dtype=kind)
    values = raw(key_of(key, "rows"), total)
    ends = np.cumsum(sizes)
    for at in range(0, len(sizes), window):
        span = slice(int(ends[at] - sizes[at]), int(ends[min(at + window, len(sizes)) - 1]))
        rows[span] = rows[span][ordered_by(values[span])]
    return rows


class Epoch:
    """Batches of one bucket each. `length` does not depend on the epoch number, so that any step can be found at once."""

    def __init__(
        self,
        buckets: Mapping[str, BucketRows],
        shares: Mapping[str, BucketShare],
        key: int,
        window: int | None,
        *,
        drop_last: bool,
    ) -> None:
        """`drop_last=False`: the last batch of a bucket is filled up with rows from the start of the bucket's order."""
        self._names = sorted(shares)
        self._sizes = [shares[name].size for name in self._names]
        self._rows = []
        for name in self._names:
            rows = shuffled_rows(buckets[name].counts, window, key_of(key, name))
            self._rows.append(_kept(rows, shares[name].keep, key_of(key, name, "keep")))
        lengths = [batches_of(len(r), size, drop_last) for r, size in zip(self._rows, self._sizes, strict=True)]
        order = np.repeat(np.arange(len(lengths), dtype=np.uint16), lengths)
        if window is not None:
            order = order[permutation(key_of(key, "batches"), len(order))]
        self._bucket = order
        self._nth = np.empty(len(order), np.int32)  # which batch of its bucket
        for number, length in enumerate(lengths):
            self._nth[order == number] = np.arange(length, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._bucket)

    def batch(self, n: int) -> RowsOfBucket:
        """The `n`-th global batch."""
        number = int(self._bucket[n])
        size, rows = self._sizes[number], self._rows[number]
        chosen = rows[int(self._nth[n]) * size : (int(self._nth[n]) + 1) * size]
        if len(chosen) < size:
            chosen = np.resize(np.concatenate([chosen, rows]), size)
        return RowsOfBucket(self._names[number], chosen.astype(np.int64))


class PackedEpoch:
    """Batches of `rule.sequences` packed sequences. How many there are depends on the order, hence on the epoch."""

    def __init__(
        self, buckets: Mapping[str, BucketRows], rule: Pack, key: int, window: int | None, *, drop_last: bool
    ) -> None:
        self._names = sorted(buckets)
        tokens = np.array([tokens_of(buckets[name].grid, rule.patch) for name in self._names], np.int64)
        for name, count in zip(self._names, tokens, strict=True):
            if count > rule.seq_len:
                raise ConfigError(
                    f"batch: a latent of bucket {name} has {count} tokens, more than Pack.seq_len {rule.seq_len}; "
                    "raise seq_len or filter the bucket out"
                )
        bucket_of, rows = _all_rows(buckets, self._names, key, window)
        self._sequences = _first_fit(bucket_of, rows, tokens, rule)
        self._size = rule.sequences
        self._length = batches_of(len(self._sequences), rule.sequences, drop_last)

    def __len__(self) -> int:
        return self._length

    def batch(self, n: int) -> list[Sequence]:
        """The `n`-th global batch."""
        chosen = self._sequences[n * self._size : (n + 1) * self._size]
        while len(chosen) < self._size:  # more than once round where there are few sequences in all
            chosen = chosen + self._sequences[: self._size - len(chosen)]
        return [
            Sequence([self._names[b] for b in one.buckets], one.rows.astype(np.int64), one.tokens) for one in chosen
        ]


def batches_of(rows: int, size: int, drop_last: bool) -> int:
    """Global batches that so many rows give."""
    return rows // size if drop_last else -(-rows // size)


def shares_of(buckets: Mapping[str, BucketRows], rule: BatchRule) -> dict[str, BucketShare]:
    """What `rule` takes of each bucket that it uses; nothing for `Pack`, which cuts sequences instead."""
    if isinstance(rule, Pack):
        return {}
    found = {name: rule.share(name, rows.grid) for name, rows in buckets.items()}
    return {name: share for name, share in found.items() if share is not None}


def _kept(rows: np.ndarray, keep: float, key: int) -> np.ndarray:
    """A fraction of `rows`, in their order: always the same number, chosen anew for each key."""
    wanted = round(keep * len(rows))
    if wanted == len(rows):
        return rows
    mask = np.zeros(len(rows), bool)
    mask[permutation(key, len(rows))[:wanted]] = True
    return rows[mask]


def _all_rows(
    buckets: Mapping[str, BucketRows], names: list[str], key: int, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all buckets in one order, with the number of their bucket."""
    counts = np.concatenate([buckets[name].counts for name in names]) if names else np.zeros(0, np.int64)
    together = shuffled_rows(counts, window, key)
    ends = np.cumsum([buckets[name].total for name in names])
    bucket_of = np.searchsorted(ends, together, side="right")
    return bucket_of.astype(np.uint16), together - (ends - [buckets[name].total for name in names])[bucket_of]


def _first_fit(bucket_of: np.ndarray, rows: np.ndarray, tokens: np.ndarray, rule: Pack) -> list[_Packed]:
    found: list[_Packed] = []
    smallest = int(tokens.min()) if len(tokens) else 0
    for at in range(0, len(rows), rule.window):
        window = slice(at, at + rule.window)
        members: list[list[int]] = []
        left: list[int] = []  # tokens free in each sequence of this window
        first_open = 0  # sequences before it have no space for any latent
        for i, count in enumerate(tokens[bucket_of[window]].tolist()):
            place = next((n for n in range(first_open, len(left)) if left[n] >= count), len(left))
            if place == len(left):
                left.append(rule.seq_len)
                members.append([])
            left[place] -= count
            members[place].append(i)
            while first_open < len(left) and left[first_open] < smallest:
                first_open += 1
        found += [
            _Packed(bucket_of[window][inside], rows[window][inside], rule.seq_len - free)
            for inside, free in zip(members, left, strict=True)
        ]
    return found

"""One epoch of one dataset as a sequence of global batches: a pure function of row counts, rule, seed and epoch number.

Per bucket: files are permuted, rows are shuffled within windows of `window` files, global batches are cut; then the batches of all
buckets are put in random order. Rows are numbers: row i of a bucket, counted over its files in the snapshot's order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.draws import CHUNK, key_of, permutation, shuffle_parts
from pipeline.loader.rules import Pack

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


def file_window(shuffle: str) -> int | None:
    """`window:64` -> 64 files; `full` -> all files; `none` -> None.

    Raises:
        ConfigError: none of these.
    """
    if shuffle == "none":
        return None
    if shuffle == "full":
        return 1 << 62
    word, _, number = shuffle.partition(":") if isinstance(shuffle, str) else ("", "", "")
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
    for at in range(0, total, CHUNK):
        rows[at : at + CHUNK] += np.arange(at, min(at + CHUNK, total), dtype=kind)
    parts = [int(sizes[at : at + window].sum()) for at in range(0, len(sizes), window)]
    shuffle_parts(rows, parts, key_of(key, "rows"))
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
        nth = np.empty(len(order), np.int32)  # which batch of its bucket
        for number, length in enumerate(lengths):
            nth[order == number] = np.arange(length, dtype=np.int32)
        self._bucket, self._nth = order.data, nth.data

    def __len__(self) -> int:
        return len(self._bucket)

    def batch(self, n: int) -> RowsOfBucket:
        """The `n`-th global batch."""
        number, nth = self._bucket[n], self._nth[n]
        size, rows = self._sizes[number], self._rows[number]
        chosen = rows[nth * size : (nth + 1) * size]
        if len(chosen) < size:
            chosen = np.resize(np.concatenate([chosen, rows]), size)
        return RowsOfBucket(self._names[number], chosen.astype(np.int64))


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

"""One epoch of one dataset as global batches of packed sequences: whole latents, placed first-fit within windows of the order.

Windows are packed when they are needed, in their order: of ten million rows only their numbers are held.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.epoch import BucketRows, batches_of, shuffled_rows
from pipeline.loader.rules import Pack, tokens_of

if TYPE_CHECKING:
    from collections.abc import Mapping

WINDOWS_HELD = 8


class Sequence(NamedTuple):
    """A packed sequence: rows with their buckets, in the order they are laid out, and their tokens together."""

    buckets: list[str]
    rows: np.ndarray
    tokens: int


class PackedEpoch:
    """Batches of `rule.sequences` packed sequences. How many there are depends on the order, hence on the epoch. Not safe for threads."""

    def __init__(
        self, buckets: Mapping[str, BucketRows], rule: Pack, key: int, window: int | None, *, drop_last: bool
    ) -> None:
        """Raises ConfigError for a latent that is longer than a sequence."""
        self._names = sorted(buckets)
        self._tokens = np.array([tokens_of(buckets[name].grid, rule.patch) for name in self._names], np.int64)
        for name, count in zip(self._names, self._tokens, strict=True):
            if count > rule.seq_len:
                raise ConfigError(
                    f"batch: a latent of bucket {name} has {count} tokens, more than Pack.seq_len {rule.seq_len}; "
                    "raise seq_len or filter the bucket out"
                )
        counts = [buckets[name].counts for name in self._names]
        self._rows = shuffled_rows(np.concatenate(counts) if counts else np.zeros(0, np.int64), window, key)
        self._bounds = np.cumsum([0, *(buckets[name].total for name in self._names)])  # of the buckets in `_rows`
        self._rule, self._drop_last = rule, drop_last
        self._windows = -(-len(self._rows) // rule.window)
        self._ends: list[int] = []  # sequences up to the end of each window that was packed
        self._held: OrderedDict[int, list[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        """Packs everything; `has` packs no more than it must."""
        while len(self._ends) < self._windows:
            self._pack_next()
        return batches_of(self._ends[-1] if self._ends else 0, self._rule.sequences, self._drop_last)

    def has(self, batches: int) -> bool:
        """Whether there are so many."""
        size = self._rule.sequences
        return self._packed(batches * size if self._drop_last else (batches - 1) * size + 1)

    def batch(self, n: int) -> list[Sequence]:
        """The `n`-th global batch. The last one is filled up from the start of the epoch, more than once round if need be."""
        found = []
        for at in range(n * self._rule.sequences, (n + 1) * self._rule.sequences):
            found.append(self._sequence(at if self._packed(at + 1) else (at - self._ends[-1]) % self._ends[-1]))
        return found

    def _packed(self, sequences: int) -> bool:
        """Packs until there are so many sequences; False if there are fewer."""
        while (self._ends[-1] if self._ends else 0) < sequences:
            if len(self._ends) >= self._windows:
                return False
            self._pack_next()
        return True

    def _pack_next(self) -> None:
        number, before = len(self._ends), self._ends[-1] if self._ends else 0
        self._ends.append(before + len(self._window(number)))

    def _sequence(self, n: int) -> Sequence:
        number = bisect_right(self._ends, n)
        return self._window(number)[n - (self._ends[number - 1] if number else 0)]

    def _window(self, number: int) -> list[Sequence]:
        if (found := self._held.get(number)) is not None:
            self._held.move_to_end(number)
            return found
        together = self._rows[number * self._rule.window : (number + 1) * self._rule.window].astype(np.int64)
        buckets = np.searchsorted(self._bounds[1:], together, side="right")
        rows = together - self._bounds[buckets]
        places, used = first_fit(self._tokens[buckets].tolist(), self._rule.seq_len)
        order = np.argsort(np.array(places), kind="stable")
        stops = np.cumsum(np.bincount(places, minlength=len(used)))
        made = []
        for tokens, start, stop in zip(used, [0, *stops.tolist()], stops.tolist(), strict=False):
            inside = order[start:stop]
            made.append(Sequence([self._names[b] for b in buckets[inside]], rows[inside], tokens))
        self._held[number] = made
        if len(self._held) > WINDOWS_HELD:
            self._held.popitem(last=False)
        return made


def first_fit(tokens: list[int], length: int) -> tuple[list[int], list[int]]:
    """For each latent the first sequence of `length` tokens with space for it; and the tokens used of each sequence."""
    free: list[int] = []
    first = dict.fromkeys(tokens, 0)  # sequences before it have no space for so many tokens: `free` never grows
    places = []
    for count in tokens:
        at = first[count]
        while at < len(free) and free[at] < count:
            at += 1
        first[count] = at
        if at == len(free):
            free.append(length)
        free[at] -= count
        places.append(at)
    return places, [length - left for left in free]

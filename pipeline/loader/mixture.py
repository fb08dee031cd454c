"""Which dataset gives the batch of a step: a pure function of weights, their changes at recorded steps, and the datasets' lengths.

Step s takes the part of [0, 1) that holds the fraction of (s + 1) x golden ratio; parts are as wide as their weights, so that every
stretch of steps is close to the weights. Integers of 64 bits throughout: the same on every machine. A dataset that has given all its
epochs leaves the mixture.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.arguments import integer, number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK, FIRST_BLOCK = 1 << 14, 64  # steps between remembered counts


class Weights(NamedTuple):
    """Weights from a step on; one for each dataset, not negative, not all zero."""

    from_step: int
    values: tuple[float, ...]


class _Block(NamedTuple):
    """Counts of each dataset's batches before `start`, and the bounds in force from there on (for those that still give batches)."""

    start: int
    counts: tuple[int, ...]
    bounds: np.ndarray  # uint64, upper bound of each active part
    active: np.ndarray  # their dataset numbers


class _Table(NamedTuple):
    """Of each step from `start` on: its dataset, and which of that dataset's batches. Views give a number in a tenth of the time."""

    start: int
    dataset: memoryview
    nth: memoryview


class Mixture:
    """`lengths`: batches that each dataset gives in all, None without end; a function where that is costly to know: the length if it is
    at most its argument, else None.
    """

    def __init__(self, lengths: Sequence[int | Callable[[int], int | None] | None], weights: Sequence[Weights]) -> None:
        """Raises ConfigError for weights that do not fit the datasets, or that change after all have given what they have."""
        self._lengths = list(lengths)
        self._weights = sorted(checked(item, len(lengths)) for item in weights)
        if not self._weights or self._weights[0].from_step > 0:
            raise ConfigError("weights: expected weights from step 0 on")
        self._blocks: list[_Block] = []
        self._end: int | None = None  # steps in all, once known
        self._table = _Table(0, np.empty(0, np.int64).data, np.empty(0, np.int64).data)  # of the block last asked for
        self._open(0, tuple(0 for _ in lengths))
        # A change that would come after the end is an error now, not when training gets there.
        while (
            not any(map(callable, lengths))
            and self._end is None
            and self._blocks[-1].start < self._weights[-1].from_step
        ):
            self._advance()

    def total(self) -> int | None:
        """Steps in all; None without end."""
        last = self._weights[-1].values
        if any(length is None and weight > 0 for length, weight in zip(self._lengths, last, strict=True)):
            return None
        while self._end is None:
            self._advance()
        return self._end

    def locate(self, step: int) -> tuple[int, int] | None:
        """Dataset of a step, and which of its batches; None after the end."""
        while self._end is None and self._blocks[-1].start <= step:
            self._advance()
        if self._end is not None and step >= self._end:
            return None
        if not 0 <= step - self._table.start < len(self._table.dataset):
            self._table = self._tabulate(bisect_right(self._blocks, step, key=lambda block: block.start) - 1)
        place = step - self._table.start
        return self._table.dataset[place], self._table.nth[place]

    def _tabulate(self, number: int) -> _Table:
        block = self._blocks[number]
        stop = self._blocks[number + 1].start if number + 1 < len(self._blocks) else self._end
        chosen = _choose(block, block.start, stop if stop is not None else block.start + BLOCK)
        nth = np.empty(len(chosen), np.int64)
        for dataset in block.active:
            places = np.flatnonzero(chosen == dataset)
            nth[places] = block.counts[dataset] + np.arange(len(places))
        return _Table(block.start, chosen.data, nth.data)

    def _advance(self) -> None:
        """Settles the steps after the last block's start: up to the next block, change of weights, or end of a dataset."""
        block = self._blocks[-1]
        # Short at first: how far ahead lengths must be known.
        stop = block.start + min(BLOCK, max(FIRST_BLOCK, block.start))
        changes = [item.from_step for item in self._weights if item.from_step > block.start]
        stop = min([stop, *changes])
        chosen = _choose(block, block.start, stop)
        for dataset in block.active:
            places = np.flatnonzero(chosen == dataset)
            length = self._length(dataset, block.counts[dataset] + len(places))
            if length is not None:
                stop = min(stop, block.start + int(places[length - block.counts[dataset] - 1]) + 1)
        chosen = chosen[: stop - block.start]
        counts = tuple(n + int((chosen == dataset).sum()) for dataset, n in enumerate(block.counts))
        self._open(stop, counts)

    def _open(self, start: int, counts: tuple[int, ...]) -> None:
        values = self._weights[bisect_right([item.from_step for item in self._weights], start) - 1].values
        active = [
            number
            for number, weight in enumerate(values)
            if weight > 0 and self._length(number, counts[number]) is None
        ]
        if not active:
            self._check_end(start, counts)
            self._end = start
            return
        shares = np.cumsum([values[number] for number in active])
        bounds = np.array([min(int(share / shares[-1] * 2.0**64), 2**64 - 1) for share in shares], np.uint64)
        bounds[-1] = np.uint64(2**64 - 1)
        self._blocks.append(_Block(start, counts, bounds, np.array(active)))

    def _length(self, dataset: int, most: int) -> int | None:
        """Batches of a dataset if they are at most `most`, else None."""
        length = self._lengths[dataset]
        if callable(length):
            return length(most)
        return length if length is not None and length <= most else None

    def _check_end(self, end: int, counts: tuple[int, ...]) -> None:
        """Raises ConfigError where a later change of weights names a dataset that has batches left."""
        for item in self._weights:
            left = [n for n, weight in enumerate(item.values) if weight > 0 and self._length(n, counts[n]) is None]
            if item.from_step > end and left:
                raise ConfigError(
                    f"weights: datasets with a weight have given all their epochs at step {end}, before the weights of step "
                    f"{item.from_step} give one to dataset {left[0]}; change the weights by step {end}, or raise epochs"
                )


def _choose(block: _Block, start: int, stop: int) -> np.ndarray:
    """Dataset of each step in [start, stop)."""
    if len(block.active) == 1:
        return np.full(stop - start, block.active[0])
    points = np.arange(start + 1, stop + 1, dtype=np.uint64) * GOLDEN  # wraps at 2^64
    return block.active[np.minimum(np.searchsorted(block.bounds, points, side="right"), len(block.active) - 1)]


def parse_weights(weights: Any, datasets: int) -> list[Weights] | None:
    """`weights` of the loader: one for each dataset, `{step: weights}` or a list of `Weights`; by step. None for None.

    Raises:
        ConfigError: none of these, or weights that do not fit the datasets.
    """
    if weights is None:
        return None
    try:
        if hasattr(weights, "items"):
            items = [Weights(step, tuple(values)) for step, values in weights.items()]
        else:
            given = list(weights)
            several = given and all(isinstance(item, Weights) for item in given)
            items = given if several else [Weights(0, tuple(given))]
    except TypeError:
        raise ConfigError(
            f"weights: expected a number for each dataset, or {{step: numbers}}, got {weights!r}"
        ) from None
    return sorted(checked(item, datasets) for item in items)


def checked(weights: Weights, datasets: int) -> Weights:
    """Weights with their own types. Raises ConfigError for those that do not fit so many datasets."""
    if len(weights.values) != datasets:
        raise ConfigError(f"weights: expected {datasets}, one for each dataset, got {len(weights.values)}")
    values = tuple(number("weights", value) for value in weights.values)
    if not sum(values) > 0:
        raise ConfigError(f"weights: expected numbers >= 0, not all zero, got {list(values)}")
    return Weights(integer("weights: step", weights.from_step, 0), values)

"""Places of the rows of a batch in their files, with other rows in place of those that were taken down or are damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.loader.draws import key_of, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from pipeline.loader.buckets import Bucket, Draw
    from pipeline.loader.dataset import LatentDataset
    from pipeline.loader.file_index import FileIndex

MOST_DRAWS = 1000  # for one row; a bucket of which so many draws are hidden has nothing left to read


@dataclass(slots=True)
class Slot:
    """One latent of a batch: `row` of the bucket, `position` in the file. `draws`: rows tried in its place so far."""

    bucket: str
    row: int
    file: int
    position: int
    index: FileIndex
    draws: int = 0

    @property
    def id(self) -> str:
        """Id of the row."""
        return str(self.index.text("id", self.position))


class SlotFinder:
    """Finds the rows of one dataset. `buckets`: those of the order, after a crop."""

    def __init__(self, dataset: LatentDataset, buckets: Mapping[str, Bucket], seed: int, pool: Executor) -> None:
        self._dataset, self._buckets, self._seed = dataset, buckets, seed
        self._pool = pool

    def find(self, bucket: str, rows: np.ndarray, epoch: int, *, held: bool = False) -> list[Slot] | None:
        """Slots of rows of a bucket, in order; rows that are hidden by a takedown are replaced.

        With `held` None if an index is not in memory, or one of another file may be needed for a row that is replaced.

        Raises:
            InputError: an index that is missing or not the recorded one; a bucket without a row left.
        """
        numbers, positions = self._buckets[bucket].locate(rows, self._draw(bucket, epoch))
        indexes = self._indexes(set(numbers.tolist()), held=held)
        if indexes is None:
            return None
        slots = [
            Slot(bucket, row, number, position, indexes[number])
            for row, number, position in zip(rows.tolist(), numbers.tolist(), positions.tolist(), strict=True)
        ]
        self._buckets[bucket].check(slots)
        if not self._dataset.takedowns:
            return slots
        hidden = [self._hidden(slot) for slot in slots]
        if held and any(hidden):
            return None
        return [self.replacement(slot, epoch) if gone else slot for slot, gone in zip(slots, hidden, strict=True)]

    def replacement(self, slot: Slot, epoch: int) -> Slot:
        """Another row of the same bucket: a draw from seed, epoch and row, the same on every machine.

        Raises:
            InputError: `MOST_DRAWS` draws were hidden or damaged.
        """
        bucket = self._buckets[slot.bucket]
        for draws in range(slot.draws, MOST_DRAWS):
            row = whole(
                key_of(self._seed, self._dataset.identity, epoch, slot.bucket, slot.row, "replacement", draws),
                len(bucket),
            )
            found = bucket.locate(np.array([row]), self._draw(slot.bucket, epoch))
            (number,), (position,) = (values.tolist() for values in found)
            made = Slot(slot.bucket, slot.row, number, position, self._dataset.indexes.get(number), draws + 1)
            bucket.check([made])
            if not self._hidden(made):
                return made
        raise InputError(
            f"bucket {slot.bucket} of {self._dataset.store.root} has no row left to read: {MOST_DRAWS} rows drawn from it were taken "
            "down or are damaged; leave it out of the batch rule, or publish again and start a new run"
        )

    def _draw(self, bucket: str, epoch: int) -> Draw:
        """Which variant of a clip is read in an epoch: a draw from seed, epoch and clip, the same on every machine."""
        return lambda row, below: whole(
            key_of(self._seed, self._dataset.identity, epoch, bucket, row, "variant"), below
        )

    def _hidden(self, slot: Slot) -> bool:
        gone = slot.index.hidden(self._dataset.takedowns)
        return gone is not None and bool(gone[slot.position])

    def _indexes(self, numbers: set[int], *, held: bool) -> dict[int, FileIndex] | None:
        """Indexes of files; those that are not in memory are read at once, unless `held`."""
        indexes = self._dataset.indexes
        found = indexes.held_of(numbers)
        if missing := [number for number in numbers if number not in found]:
            if held:
                return None
            read = self._pool.map(indexes.get, missing) if len(missing) > 1 else map(indexes.get, missing)
            found.update(zip(missing, read, strict=True))
        return found

"""Which variants of each clip are read: all, one by its name, or one that is drawn anew in each epoch.

All variants of a clip lie side by side in one file, in the order that the fingerprint gives (docs/formats.md). Which rows belong together
follows from their positions, without reading an index. `check` compares the ids of rows that are read, and refuses a file in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError, InputError
from pipeline.loader.buckets import Bucket
from pipeline.records import split_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline.loader.buckets import Draw
    from pipeline.loader.files import DataFiles
    from pipeline.loader.slots import Slot

ALL, DRAW = "all", "draw"


def check_variants(variants: object, names: tuple[str, ...], root: str) -> str:
    """`variants` of the loader, for an output whose clips have the variants `names`.

    Raises:
        ConfigError: not `all`, `draw` or one of the names.
    """
    if not isinstance(variants, str) or variants not in (ALL, DRAW, *names):
        raise ConfigError(f"variants: expected all, draw or one of {', '.join(names)} for {root}, got {variants!r}")
    return variants


def with_variants(
    buckets: Mapping[str, Bucket], variants: str, names: tuple[str, ...], files: DataFiles
) -> dict[str, Bucket]:
    """The buckets with one row for each clip; as they are for `all`, or if clips have one variant only. Buckets without rows are left out.

    Raises:
        InputError: a file whose rows are not in groups of all variants.
    """
    if variants == ALL or len(names) == 1:
        return dict(buckets)
    made = {name: _ClipBucket(bucket, variants, names, files) for name, bucket in buckets.items()}
    return {name: bucket for name, bucket in made.items() if len(bucket)}


class _ClipBucket(Bucket):
    """Clips of one shape, of each of which one variant is read. Clips of which a filter or a takedown left no such variant are left out."""

    def __init__(self, bucket: Bucket, variants: str, names: tuple[str, ...], files: DataFiles) -> None:
        self._names, self._files = names, files
        step = len(names)
        self._fixed = None if variants == DRAW else names.index(variants)
        counts = bucket.counts // step
        chosen: dict[int, np.ndarray] = {}
        self._first: dict[int, np.ndarray] = {}
        for place, positions in bucket.chosen.items():
            if self._fixed is None:
                # Positions are sorted, so those of one clip are neighbours; `first` has the index of the first of each clip.
                first = np.flatnonzero(np.diff(positions // step, prepend=-1))
                chosen[place], self._first[place], counts[place] = positions, first, len(first)
            else:
                chosen[place] = positions[positions % step == self._fixed]
                counts[place] = len(chosen[place])
        uneven = bucket.counts % step != 0
        uneven[list(bucket.chosen)] = False
        if uneven.any():
            number = int(bucket.files[np.flatnonzero(uneven)[0]])
            raise InputError(
                f"{files.value('key', number)} has {files.value('file_rows', number)} rows, expected {step} for each clip "
                f"({', '.join(names)}); see `lathe verify`"
            )
        super().__init__(bucket.shape, bucket.grid, bucket.files, counts, chosen)

    def locate(self, rows: np.ndarray, draw: Draw | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As in `Bucket`; `rows` are numbers of clips. `draw` is needed where variants are drawn."""
        places = np.searchsorted(self._ends, rows, side="right")
        clips = rows - self._starts[places]
        positions = np.empty(len(rows), np.int64)
        for i, (row, place, clip) in enumerate(zip(rows.tolist(), places.tolist(), clips.tolist(), strict=True)):
            positions[i] = self._position(row, place, clip, draw)
        return self.files[places], positions

    def check(self, slots: Iterable[Slot]) -> None:
        """Raises InputError for a row that is of another variant than its place in the file says."""
        for slot in slots:
            expected = self._names[slot.position % len(self._names)]
            if (found := split_id(slot.id)[1]) != expected:
                raise InputError(
                    f"row {slot.position} of {self._files.value('key', slot.file)}, {slot.id}, is variant {found}, expected {expected} "
                    'there: its rows are not in groups of all variants; read it with variants="all"'
                )

    def _position(self, row: int, place: int, clip: int, draw: Draw | None) -> int:
        kept, step = self.chosen.get(place), len(self._names)
        if self._fixed is not None:
            return clip * step + self._fixed if kept is None else int(kept[clip])
        if draw is None:
            raise ValueError("locate needs a draw where variants are drawn")
        if kept is None:
            return clip * step + draw(row, step)
        first = self._first[place]
        begin, end = first[clip], first[clip + 1] if clip + 1 < len(first) else len(kept)
        return int(kept[begin + draw(row, int(end - begin))])

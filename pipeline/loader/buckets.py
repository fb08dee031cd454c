"""Buckets of a dataset: which rows of which files have one latent shape. Clips that are whole videos are sorted by their length."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from pipeline.loader.epoch import BucketRows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline.loader.files import DataFiles
    from pipeline.loader.ranges import Bounds
    from pipeline.loader.rules import Grid
    from pipeline.loader.slots import Slot
    from pipeline.loader.spec import DatasetSpec

Draw = Callable[[int, int], int]
"""Of a row of the bucket and a number N: a number in [0, N)."""
NAME = re.compile(r"v?(?P<frames>n|\d+)x(?P<height>\d+)x(?P<width>\d+)")


@dataclass(frozen=True, slots=True)
class Shape:
    """Frames, height and width of a clip in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Bucket:
    """Rows of one shape. Row i is counted over the files in their order; `chosen`: by place in `files`, positions of rows that count,
    where not all rows of the file do.
    """

    def __init__(
        self, shape: Shape, grid: Grid, files: np.ndarray, counts: np.ndarray, chosen: dict[int, np.ndarray]
    ) -> None:
        self.shape, self.grid = shape, grid
        self.files, self.counts, self.chosen = files, counts, chosen
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self) -> BucketRows:
        """What the order needs to know."""
        return BucketRows(self.grid, self.counts)

    def locate(self, rows: np.ndarray, draw: Draw | None = None) -> tuple[np.ndarray, np.ndarray]:
        """File number and position in the file of each row: int32, int64. `draw`: for buckets of clips with several variants."""
        places = self._ends.searchsorted(rows, side="right")
        positions = rows - self._starts[places]
        if self.chosen:
            for i, place in enumerate(places.tolist()):
                if (kept := self.chosen.get(place)) is not None:
                    positions[i] = kept[positions[i]]
        return self.files[places], positions

    def check(self, slots: Iterable[Slot]) -> None:
        """Raises InputError for a row that is not what `locate` took it for."""

    def positions(self, place: int) -> np.ndarray:
        """Positions of the rows of the `place`-th file, ascending."""
        found = self.chosen.get(place)
        return np.arange(self.counts[place], dtype=np.int32) if found is None else found


def parse_name(name: str) -> tuple[int | None, int, int]:
    """`v17x256x256` or `17x256x256` -> frames, height, width; frames are None in buckets of whole videos."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a bucket; expected FRAMESxHEIGHTxWIDTH")
    return None if match["frames"] == "n" else int(match["frames"]), int(match["height"]), int(match["width"])


def make_buckets(
    files: DataFiles,
    spec: DatasetSpec,
    kept: Mapping[int, np.ndarray],
    bounds: Callable[[], Bounds],
    lengths: Callable[[Iterable[int]], dict[int, np.ndarray]],
) -> dict[str, Bucket]:
    """Buckets by name (`17x256x256`), those without rows left out.

    Args:
        files: data files.
        spec: of the network.
        kept: by file, positions that a filter left, of files of which it left out rows.
        bounds: fewest and most frames of a row in each file; asked for if there are files of whole videos.
        lengths: frames of each row of the given files, by file, int64; asked for files of whole videos of several lengths.
    """
    counts = files.rows()
    odd = {number: positions for number in files.hidden if (positions := files.positions(number)) is not None}
    odd.update(kept)
    nothing = np.zeros(len(files), bool)
    nothing[[number for number, positions in odd.items() if not len(positions)]] = True
    parts: dict[Shape, _Part] = {}
    for name, all_numbers in sorted(files.buckets().items()):
        frames, height, width = parse_name(name)
        numbers = all_numbers[~nothing[all_numbers]]
        if frames is not None:
            parts.setdefault(Shape(frames, height, width), _Part()).whole.append(numbers)
            continue
        low, constant = _lengths_of_files(bounds())
        same, mixed = numbers[constant[numbers]], numbers[~constant[numbers]]
        for length in np.unique(low[same]).tolist():
            parts.setdefault(Shape(length, height, width), _Part()).whole.append(same[low[same] == length])
        for number, found in lengths(mixed.tolist()).items():
            positions = odd.get(number, np.arange(len(found), dtype=np.int32))
            for length in np.unique(found[positions]).tolist():
                part = parts.setdefault(Shape(length, height, width), _Part())
                part.whole.append(np.array([number], np.int32))
                part.odd[number] = positions[found[positions] == length]
    made = {str(shape): part.bucket(shape, spec, counts, odd) for shape, part in parts.items()}
    return {name: made[name] for name in sorted(made, key=_sort_key) if len(made[name])}


def _lengths_of_files(bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Fewest frames in each file, int64, and whether all rows have as many."""
    return pc.fill_null(bounds.low, 0).to_numpy(), bounds.constant().to_numpy(zero_copy_only=False)


def merged(shape: Shape, grid: Grid, buckets: list[Bucket]) -> Bucket:
    """One bucket of the rows of several, which a crop gives one shape."""
    chosen, before = {}, 0
    for bucket in buckets:
        chosen.update({before + place: positions for place, positions in bucket.chosen.items()})
        before += len(bucket.files)
    return Bucket(
        shape, grid, np.concatenate([b.files for b in buckets]), np.concatenate([b.counts for b in buckets]), chosen
    )


class _Part:
    """Files of one shape while buckets are made."""

    def __init__(self) -> None:
        self.whole: list[np.ndarray] = []
        self.odd: dict[int, np.ndarray] = {}

    def bucket(
        self, shape: Shape, spec: DatasetSpec, file_rows: np.ndarray, others: Mapping[int, np.ndarray]
    ) -> Bucket:
        """`others`: positions in files of which not all rows count."""
        numbers = np.sort(np.concatenate(self.whole))
        counts = file_rows[numbers].copy()
        chosen = {}
        if self.odd or others:
            for place, number in enumerate(numbers.tolist()):
                if (positions := self.odd.get(number, others.get(number))) is not None:
                    chosen[place], counts[place] = positions, len(positions)
        return Bucket(shape, spec.grid(shape.frames, shape.height, shape.width), numbers, counts, chosen)


def _sort_key(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("x")))

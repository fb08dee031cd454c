"""What the manifest knows of the rows of each data file without reading it: the smallest and largest value of some columns, and whether
they have each paired video.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from pipeline.loader.buckets import parse_name
from pipeline.loader.expression import FRAMES_BUCKET, ORDERED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.loader.expression import Path
    from pipeline.loader.files import DataFiles

_RANGES = pa.schema(
    [("id", pa.list_(pa.string())), ("num_frames", pa.list_(pa.int64())), ("fps", pa.list_(pa.float64()))]
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Smallest and largest value in each file; null where the manifest does not have it."""

    low: pa.Array
    high: pa.Array

    def constant(self) -> pa.Array:
        """Whether all rows of a file have one value, which is `low`."""
        return pc.fill_null(pc.equal(self.low, self.high), False)


def bounds_of_files(files: DataFiles, members: Sequence[str] = ()) -> dict[Path, Bounds]:
    """Bounds of the columns `ORDERED`, `CONSTANT` and `FRAMES_BUCKET`; of each of `members` whether the rows of a file have it, bool."""
    text = "\n".join(files.table["ranges"].to_pylist()).encode()
    schema = pa.schema([*_RANGES, *(pa.field(name, pa.list_(pa.bool_())) for name in members)])
    parsing = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # 100,000 files in 0.1 s; objects of Python take 0.6 s.
    ranges = pj.read_json(io.BytesIO(text), pj.ReadOptions(use_threads=False), parsing)
    found: dict[Path, Bounds] = {}
    for name in ORDERED:
        pairs = ranges[name].combine_chunks()
        found[(name,)] = Bounds(pc.list_element(pairs, 0), pc.list_element(pairs, 1))
    for name in members:  # only builds that may lack it record it
        found[(name,)] = _same(pc.fill_null(pc.list_element(ranges[name].combine_chunks(), 0), True))
    names = files.table["bucket"].to_pylist()
    shapes = {name: parse_name(name) for name in set(names)}
    found["height",], found["width",] = (
        _same(pa.array([shapes[name][i] for name in names], pa.int64())) for i in (1, 2)
    )
    for name in ("bucket", "fingerprint"):
        found[(name,)] = _same(files.table[name].combine_chunks().cast(pa.string()))
    frames = found["num_frames",]
    sizes = pa.array([name.partition("x")[2] for name in names], pa.string())
    spelled = pc.binary_join_element_wise(frames.low.cast(pa.string()), sizes, "x")
    whole = pc.fill_null(pc.not_equal(frames.low, frames.high), True)
    found[FRAMES_BUCKET] = Bounds(spelled, pc.if_else(whole, pa.scalar(None, pa.string()), spelled))
    return found


def _same(values: pa.Array) -> Bounds:
    return Bounds(values, values)

"""Rows of a snapshot for the table of the report, and histograms over them: all rows, or `MOST_ROWS` evenly spread over `MOST_FILES` files.

Reads side indexes, and of data files the scalar columns that are there. Of tars, whose scalars cost a request for each row, a few rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, NotFound
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import stored_index
from pipeline.look.stored import row_facts
from pipeline.report.values import Histogram, Rows
from pipeline.storage import is_remote
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.format.index import IndexRow
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.storage import Store

MOST_ROWS = 10_000
MOST_FILES = 512
WORKERS = 8  # threads that read files of a remote store
TAR_ROWS = 256  # of which scalars are read
CAPTION = 160  # characters
NAME = 120
DETAILS = ("duration_sec", "fps", "src_width", "src_height", "src_fps", "codec", "clip_start_sec", "variant")
BINS = 12
COLUMNS = (
    "id",
    "key",
    "caption",
    "bucket",
    "frames",
    "seconds",
    "fps",
    "source size, px",
    "codec",
    "variant",
    "source",
)
CAPTION_AT, BUCKET_AT = COLUMNS.index("caption"), COLUMNS.index("bucket")


def sample_rows(store: Store, files: pa.Table, takedowns: Takedowns) -> Rows:
    """Rows of the files of a snapshot (`ledger.manifest.FILES`), without those that takedowns hide.

    Raises:
        InputError: an index or data file that cannot be read, or is missing although no takedown may have deleted it.
    """
    listed = [
        row
        for row in files.select(["key", "index_key", "bytes", "rows", "file_rows", "hidden"]).to_pylist()
        if row["rows"]
    ]
    total = sum(row["rows"] for row in listed)
    chosen = listed
    if len(listed) > MOST_FILES:
        chosen = [listed[i * len(listed) // MOST_FILES] for i in range(MOST_FILES)]
    a_file = total if total <= MOST_ROWS else max(1, math.ceil(MOST_ROWS / len(chosen)))
    a_tar = max(1, TAR_ROWS // max(1, sum(file["key"].endswith(".tar") for file in chosen)))
    read = mapped_ahead(
        lambda file: _rows_of(store, file, takedowns, a_file, a_tar),
        chosen,
        WORKERS if is_remote(store.root) else 1,
        "rows",
    )
    found = list(islice((row for rows in read for row in rows), MOST_ROWS))
    cells, details = [row for row, _ in found], [each for _, each in found]
    return Rows(
        total=total,
        columns=COLUMNS,
        cells=tuple(cells),
        sampled=len(cells) < total,
        files_read=len(chosen),
        files=len(listed),
        without_caption=sum(not row[CAPTION_AT] for row in cells),
        histograms=tuple(filter(None, _histograms([row[BUCKET_AT] for row in cells], details))),
    )


def _rows_of(
    store: Store, file: dict[str, Any], takedowns: Takedowns, a_file: int, a_tar: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Cells and details of up to `a_file` rows of a file. `a_tar`: rows of a tar of which details are read; others have none."""
    index = _shown(store, file, takedowns)
    wanted = index if len(index) <= a_file else [index[i * len(index) // a_file] for i in range(a_file)]
    if not wanted:  # of a file that may be deleted
        return []
    if file["key"].endswith(".tar"):
        read = [row_facts(store, file["key"], row) for row in wanted[:a_tar]]
        read += [{}] * (len(wanted) - len(read))
    else:
        read = _details(store, file, [row.row for row in wanted])
    details = [{name: each.get(name) for name in DETAILS} for each in read]
    return [(_cells(row, each), each) for row, each in zip(wanted, details, strict=True)]


def seconds_of(files: pa.Table, rows: Rows) -> tuple[float | None, bool]:
    """Seconds of video in all clips, and whether they are exact: frames over the frame rate of each file, whose range the manifest has;
    of files whose rows have several, by the mean of the sample.
    """
    at = {name: place for place, name in enumerate(rows.columns)}
    known = [(row[at["frames"]], row[at["seconds"]]) for row in rows.cells if row[at["seconds"]] is not None]
    frames, seconds = sum(item[0] for item in known), sum(item[1] for item in known)
    total, exact = 0.0, True
    for ranges, count in zip(files["ranges"].to_pylist(), files["frames"].to_pylist(), strict=True):
        if not count:
            continue
        low, high = _fps_range(ranges)
        if low is not None and low == high:
            total += count / low
        elif frames:
            total, exact = total + count * seconds / frames, False
        else:
            return None, False
    return total, exact


def _fps_range(ranges: str) -> tuple[float | None, float | None]:
    found = json.loads(ranges).get("fps")
    return (float(found[0]), float(found[1])) if found and found[0] else (None, None)


def _shown(store: Store, file: dict[str, Any], takedowns: Takedowns) -> list[IndexRow]:
    hidden = set(file["hidden"])
    try:
        rows = stored_index(store, file["index_key"])
    except NotFound:
        if not takedowns:
            raise
        return []  # files whose rows are all taken down may be deleted
    return [row for row in rows if row.row not in hidden and not takedowns.hides(row)]


def _details(store: Store, file: dict[str, Any], positions: Sequence[int]) -> list[dict[str, Any]]:
    """Columns of `DETAILS` that a Parquet file has, of the rows at these positions."""
    key = file["key"]
    try:
        opened = pq.ParquetFile(pa.PythonFile(RangedFile(store, key, file["bytes"]), mode="r"), pre_buffer=True)
        names = [name for name in DETAILS if name in opened.schema_arrow.names]
        table = opened.read(names, use_threads=False).take(pa.array(positions, pa.int64()))
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{store.uri(key)} cannot be read: {error}; see `lathe verify`") from None
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def _cells(index: IndexRow, details: dict[str, Any]) -> tuple[Any, ...]:
    width, height = details.get("src_width"), details.get("src_height")
    seconds = details.get("duration_sec")
    return (
        index.id,
        _cut(index.source_key, NAME),
        _cut(index.caption, CAPTION),
        index.bucket,
        index.num_frames,
        None if seconds is None else round(seconds, 3),
        None if details.get("fps") is None else round(details["fps"], 3),
        f"{width}x{height}" if width and height else None,
        details.get("codec"),
        details.get("variant"),
        _cut(index.source_uri, NAME),
    )


def _histograms(buckets: Sequence[str], details: Sequence[dict[str, Any]]) -> list[Histogram | None]:
    """Source against stored, over rows whose scalars were read. `buckets`: of the same rows."""
    pairs = [(bucket, item) for bucket, item in zip(buckets, details, strict=True) if item["src_height"]]
    heights = {"source": [item["src_height"] for _, item in pairs], "stored": [_height(bucket) for bucket, _ in pairs]}
    rated = [item for item in details if item["src_fps"] and item["fps"]]
    rates = {
        "source": [round(item["src_fps"], 2) for item in rated],
        "stored": [round(item["fps"], 2) for item in rated],
    }
    lengths = {"stored": [round(item["duration_sec"], 2) for item in details if item["duration_sec"] is not None]}
    return [
        _histogram("Frame height: source against stored", "pixels", heights),
        _histogram("Frame rate: source against stored", "frames/s", rates),
        _histogram("Length of a clip", "seconds", lengths),
    ]


def _height(bucket: str) -> float:
    return float(bucket.split("x")[1]) if bucket.count("x") == 2 else 0.0


def _histogram(name: str, unit: str, series: dict[str, list[Any]]) -> Histogram | None:
    """Single values where there are few, else equal steps from the least to the greatest."""
    every = sorted({value for values in series.values() for value in values})
    if not every:
        return None
    if len(every) <= BINS:
        counted = {name: Counter(values) for name, values in series.items()}
        return Histogram(
            name,
            unit,
            tuple(f"{value:g}" for value in every),
            {each: tuple(counts[value] for value in every) for each, counts in counted.items()},
        )
    low, step = every[0], (every[-1] - every[0]) / BINS
    labels = tuple(f"{low + i * step:.4g} to {low + (i + 1) * step:.4g}" for i in range(BINS))
    return Histogram(name, unit, labels, {each: _binned(values, low, step) for each, values in series.items()})


def _binned(values: Iterable[float], low: float, step: float) -> tuple[int, ...]:
    counts = Counter(min(BINS - 1, int((value - low) / step)) for value in values)
    return tuple(counts[place] for place in range(BINS))


def _cut(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else f"{text[: most - 1]}…"

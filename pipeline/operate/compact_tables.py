"""Tables of the snapshot that a compaction makes: those of a candidate, with its files and copies replaced by compacted ones.

The candidate may be newer than the one whose files were copied: rows that were hidden meanwhile are hidden in the compacted file too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PublishFailed
from pipeline.ledger.candidate import LIGHT_FILES
from pipeline.ledger.copies import COPIES, Copies, file_text
from pipeline.ledger.manifest import FILES, read_batches, read_table, write_table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pipeline.ledger.candidate import Candidate
    from pipeline.operate.compact_files import Compacted, Part


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A candidate with compacted files, and what changed."""

    candidate: Candidate
    files_before: int
    files_after: int
    files_dropped: int  # of which the candidate shows no row, and whose rows are recorded as dropped
    rows_dropped: int  # rows of the files before, and of dropped files, that did not count and are not copied


def rewritten(candidate: Candidate, made: Sequence[Compacted], hidden: Sequence[Part], folder: Path) -> Rewritten:
    """`candidate` with `made` in place of their sources, and with the rows of `hidden` recorded as dropped, see `compact_hidden`.

    Raises:
        PublishFailed: rows count now that were not copied; nothing of this compaction fits any more.
    """
    parts = [part for item in made for part in item.parts]
    sources = {part.source["key"]: part for part in (*parts, *hidden)}
    gone = pa.array(sources, pa.string())
    found: dict[str, dict[str, Any]] = {}
    tables = []
    for batch in read_batches(candidate.files_path):
        mine = pc.is_in(batch["key"], gone)
        found.update({row["key"]: row for row in batch.filter(mine).to_pylist()})
        tables.append(pa.Table.from_batches([batch.filter(pc.invert(mine))]))
    for part in hidden:
        if (now := found.get(part.source["key"])) is not None:
            raise _counts_again(part, now["rows"])
    earlier = candidate.copies.by_file() if any(key in candidate.copies.files for key in sources) else {}
    origins = set(candidate.copies.table["origin"].to_pylist())
    files, copies = [], []
    # Files of receipts that have copies already, with the ids of rows that are not copied now.
    again: dict[str, set[str]] = {}
    for item in made:
        row = _file_row(item, found)
        if row["rows"]:
            files.append(row)
        text = file_text(row)
        for part in item.parts:
            found_copies = _copies(part, text, earlier.get(part.source["key"]))
            if part.source["key"] in origins:  # rows that had been dropped count again; the others are in other copies
                again[part.source["key"]] = {row["id"] for row in part.dropped.values()}
                found_copies = [{**copy, "dropped": []} for copy in found_copies]
            copies += found_copies
    for part in hidden:
        copies += _copies(part, file_text(part.source), earlier.get(part.source["key"]))
    tables.append(pa.Table.from_pylist(files, FILES))
    path = write_table(pa.concat_tables(tables), folder / "compacted-files", "key")
    return Rewritten(
        replace(
            candidate,
            files=read_table(path, LIGHT_FILES, ["network", "fingerprint"]),
            files_path=path,
            copies=_all_copies(candidate.copies, sources, copies, again),
            fresh=pa.array([item.shard_id for item in made], pa.string()),
            unchanged=False,
        ),
        files_before=len(found),
        files_after=len(files),
        files_dropped=len(hidden),
        rows_dropped=sum(len(part.dropped) for part in sources.values()),
    )


def _file_row(item: Compacted, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Row of `manifest.FILES` of a compacted file. `found`: its sources in the candidate; those that are not there count nowhere."""
    counting = np.zeros(item.file.rows, bool)
    frames = 0
    for part in item.parts:
        now = found.get(part.source["key"])
        shown = np.zeros(len(part.frames), bool)
        if now is not None:
            shown[:] = True
            shown[now["hidden"]] = False
        copied = shown[part.kept]
        if copied.sum() != shown.sum():
            raise _counts_again(part, int(shown.sum() - copied.sum()))
        counting[part.first : part.first + len(part.kept)] = copied
        frames += int(part.frames[shown].sum())
    first = item.parts[0].source
    return {
        "key": item.file.key,
        "index_key": item.file.index_key,
        "bucket": item.file.bucket,
        "rows": int(counting.sum()),
        "frames": frames,
        "bytes": item.file.num_bytes,
        "sha256": item.file.sha256,
        "index_bytes": item.file.index_bytes,
        "index_sha256": item.file.index_sha256,
        "shard_id": item.shard_id,
        "network": first["network"],
        "fingerprint": first["fingerprint"],
        "file_rows": item.file.rows,
        "file_frames": item.file.frames,
        "ranges": json.dumps(item.file.ranges, sort_keys=True) if item.file.ranges else "{}",
        "hidden": np.flatnonzero(~counting).tolist(),
    }


def _counts_again(part: Part, rows: int) -> PublishFailed:
    return PublishFailed(
        f"{rows} rows of {part.source['key']} count again since they were left out of the compacted file, as a takedown or input was taken "
        "back; nothing was published. Run again"
    )


def _copies(part: Part, text: str, earlier: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Rows of `COPIES` of one source: a file of a receipt, or with `earlier` a compacted file that has these copies."""
    if earlier is None:
        return [_copy(part, text, part.source["shard_id"], part.source["key"], 0, len(part.frames), [])]
    return [
        _copy(part, text, old["shard_id"], old["origin"], old["first"], old["first"] + old["rows"], old["dropped"])
        for old in earlier
    ]


def _copy(
    part: Part, text: str, shard_id: str, origin: str, begin: int, end: int, dropped: list[dict[str, Any]]
) -> dict[str, Any]:
    """Row of `COPIES` of positions `[begin, end)` of a source."""
    low, high = np.searchsorted(part.kept, [begin, end]).tolist()
    kept = part.kept[low:high]
    return {
        "shard_id": shard_id,
        "origin": origin,
        "file": text,
        "first": part.first + low,
        "rows": high - low,
        "frames": int(part.frames[kept].sum()),
        "bytes": int(part.num_bytes[kept].sum()),
        "dropped": [*dropped, *(row for position, row in sorted(part.dropped.items()) if begin <= position < end)],
    }


def _all_copies(
    before: Copies, sources: Collection[str], added: list[dict[str, Any]], again: dict[str, set[str]]
) -> Copies:
    """Earlier copies without those in the files `sources`, and those that were added. Of origins in `again`, only rows with these ids stay
    dropped: the others were copied now.
    """
    table = before.without(sources)
    if again:
        mine = pc.is_in(table["origin"], pa.array(again, pa.string()))
        added = [*table.filter(mine).to_pylist(), *added]
        table = table.filter(pc.invert(mine))
        for row in added:
            if (left := again.get(row["origin"])) is not None:
                row["dropped"] = [item for item in row["dropped"] if item["id"] in left]
        added = [row for row in added if row["rows"] or row["dropped"]]
    return Copies(pa.concat_tables([table, pa.Table.from_pylist(added, COPIES)]))

"""Check of `--removed drop`: inputs that the listing lacks are not too many, nor their rows.

An empty mount or a wrong prefix would empty the output, and every other check would pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_batches
from pipeline.ledger.receipts import stored_index
from pipeline.ledger.snapshots import Check
from pipeline.ledger.summary import uri_id
from pipeline.operate.lost_receipts import copied_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.format.index import IndexRow
    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store

READ = ["shard_id", "fingerprint", "index_key", "hidden"]
WORKERS = 16


def removed_check(store: Store, candidate: Candidate, limit: float) -> Check:
    """Inputs that this listing lacks are at most `limit` of all, and so are their rows of the parent's. Reads indexes of such inputs."""
    dropped = candidate.decisions.selection.dropped
    inputs, inputs_before = sum(map(len, dropped.values())), candidate.decisions.num_inputs
    rows = sum(mapped_ahead(lambda row: _rows(store, row, dropped), _touched(candidate), WORKERS, "removed"))
    for file, _, found in copied_rows(store, candidate, _shards(dropped)):
        rows += _counted(file, found or [], dropped)
    rows_before = 0
    if candidate.parent is not None:
        there = set(candidate.receipts["fingerprint"].unique().to_pylist())
        rows_before = sum(item.rows for name, item in candidate.parent.fingerprints.items() if name in there)
    of_inputs, of_rows = inputs / max(inputs_before, 1), rows / max(rows_before, 1)
    numbers = {
        "inputs_removed": inputs,
        "inputs_before": inputs_before,
        "rows_removed": rows,
        "rows_before": rows_before,
        "removed_ratio": max(of_inputs, of_rows),
        "limit": limit,
    }
    ok = max(of_inputs, of_rows) <= limit
    message = (
        f"{inputs} of {inputs_before} inputs ({of_inputs:.1%}) and {rows} of {rows_before} rows ({of_rows:.1%}) would be dropped "
        f"because they are not listed, the limit is {limit:.1%}; check that the inputs are complete, or raise --max-removed"
    )
    return Check("removed", ok, "" if ok else message, numbers)


def _touched(candidate: Candidate) -> Iterator[dict[str, Any]]:
    """Files of the parent whose receipts have a dropped input."""
    dropped = candidate.decisions.selection.dropped
    shards = _shards(dropped)
    if candidate.parent_files is None or not len(shards):
        return
    for batch in read_batches(candidate.parent_files, READ):
        yield from batch.filter(pc.is_in(batch["shard_id"], shards)).to_pylist()


def _rows(store: Store, row: dict[str, Any], dropped: dict[str, dict[bytes, str]]) -> int:
    """Rows of dropped inputs in one file that counted in the parent; 0 if its index cannot be read, which `files_check` reports."""
    try:
        found = stored_index(store, row["index_key"])
    except (NotFound, OutputError):
        return 0
    return _counted(row, found, dropped)


def _counted(file: dict[str, Any], rows: list[IndexRow], dropped: dict[str, dict[bytes, str]]) -> int:
    gone, hidden = dropped.get(file["fingerprint"], {}), set(file["hidden"])
    return sum(row.row not in hidden and uri_id(row.source_uri) in gone for row in rows)


def _shards(dropped: dict[str, dict[bytes, str]]) -> pa.Array:
    return pa.array({shard for found in dropped.values() for shard in found.values()}, pa.string())

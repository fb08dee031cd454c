"""Stored files none of whose rows count, of which `lathe compact` records that all rows are dropped, so that `lathe gc` deletes them.

A snapshot does not name such a file, so that no compaction would copy it, and gc keeps it: its rows could count again. Two kinds: files of
receipts that count in part, and compacted files. Files of receipts of which nothing counts are no concern here: gc retires these receipts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.copies import dropped_row
from pipeline.ledger.counted import Share
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import file_row, read_batches, read_table
from pipeline.ledger.overlaps import CountedReceipt
from pipeline.ledger.receipts import Ledger, retired_shards
from pipeline.ledger.summaries import Summaries
from pipeline.operate.compact_files import Part
from pipeline.operate.stored_rows import checked_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store


def hidden_files(
    store: Store, candidate: Candidate, folder: Path, *, only_takedowns: bool = False, workers: int = 8
) -> list[Part]:
    """Files of which the candidate shows no row and whose index is stored, each with all its rows as dropped.

    Args:
        store: the output.
        candidate: contents of the newest snapshot.
        folder: local scratch folder.
        only_takedowns: only files with rows that were taken down.
        workers: threads that read receipts and indexes.

    Raises:
        OutputError: a receipt or an index that cannot be read.
    """
    takedowns = candidate.decisions.overlaps.takedowns
    files = [*_compacted(store, candidate), *_of_receipts(store, candidate, folder, workers)]

    def part(file: dict[str, Any]) -> Part | None:
        if not store.exists(file["index_key"]):  # deleted, by takedowns
            return None
        rows = checked_index(store, file)
        if only_takedowns and not any(map(takedowns.hides, rows)):
            return None
        nothing = np.zeros(len(rows), np.int64)
        return Part(file, 0, np.zeros(0, np.int32), nothing, nothing, {row.row: dropped_row(row) for row in rows})

    return [found for found in mapped_ahead(part, files, workers, "indexes") if found is not None]


def _compacted(store: Store, candidate: Candidate) -> Iterator[dict[str, Any]]:
    """Compacted files that hold rows of receipts and that the candidate does not name, as rows of `manifest.FILES`.

    Without files with rows of a receipt that the candidate does not cover: the snapshot may leave out their fingerprint.
    """
    files = candidate.copies.files if candidate.copies else {}
    if not (unnamed := _unnamed(candidate, list(files))):
        return
    copies, decided = candidate.copies.by_file(), {*candidate.decisions.shards.to_pylist(), *retired_shards(store)}
    for key in unnamed:
        if all(copy["shard_id"] in decided for copy in copies[key]):
            yield {**files[key], "rows": 0, "frames": 0, "hidden": []}


def _of_receipts(store: Store, candidate: Candidate, folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Files that the candidate does not name and that were not copied, of receipts of which something counts."""
    takedowns, ledger = candidate.decisions.overlaps.takedowns, Ledger(store)
    keys = _incomplete(store, candidate, folder, workers)
    read = mapped_ahead(ledger.load, keys, workers, "receipts")
    receipts = {
        receipt.shard_id: receipt for receipt in read if receipt is not None and not takedowns.hides_all(receipt)
    }
    rows = {
        item.key: file_row(CountedReceipt(receipt), Share(item, 0, 0, 0))
        for shard, receipt in receipts.items()
        for item in receipt.files
        if item.key not in candidate.copies.of(shard)
    }
    yield from (rows[key] for key in _unnamed(candidate, list(rows)))


def _incomplete(store: Store, candidate: Candidate, folder: Path, workers: int) -> list[str]:
    """Keys of receipts of which something counts, and of which the files of the candidate and its copies do not have all rows."""
    summaries = read_table(Summaries(store, workers).spool(folder / "summaries-again"), ["key", "clips"])
    receipts = candidate.receipts.select(["shard_id", "own_shard", "clips"])
    shards = receipts.filter(pc.or_(receipts["own_shard"], pc.greater(receipts["clips"], 0)))["shard_id"]
    decided = candidate.decisions
    keys = decided.keys.take(pc.index_in(shards, decided.shards).combine_chunks())
    written = summaries["clips"].take(pc.index_in(keys, summaries["key"].combine_chunks()))
    known = pc.fill_null(_rows_of_shards(candidate, shards), 0)
    return keys.filter(pc.greater(written, known)).to_pylist()


def _rows_of_shards(candidate: Candidate, shards: pa.ChunkedArray) -> pa.ChunkedArray:
    """Rows of each shard in files that the candidate names or in copies, with dropped ones; null where there are none."""
    copies = candidate.copies.table
    copied = pc.add(copies["rows"], pc.list_value_length(copies["dropped"]))
    tables = [pa.table({"shard_id": copies["shard_id"], "rows": copied})]
    for batch in read_batches(candidate.files_path, ["key", "shard_id", "file_rows"]):
        own = batch.filter(pc.invert(pc.is_in(batch["key"], copies["origin"])))
        tables.append(pa.table({"shard_id": own["shard_id"], "rows": own["file_rows"]}))
    sums = pa.concat_tables(tables).group_by("shard_id").aggregate([("rows", "sum")])
    return sums["rows_sum"].take(pc.index_in(shards, sums["shard_id"].combine_chunks()))


def _unnamed(candidate: Candidate, keys: list[str]) -> list[str]:
    """Of these data files, those that the candidate does not name."""
    asked = pa.array(keys, pa.string())
    return asked.filter(pc.invert(pc.is_in(asked, candidate.files["key"].combine_chunks()))).to_pylist()

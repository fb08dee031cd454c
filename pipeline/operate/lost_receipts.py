"""Receipts that the parent of the next snapshot covers and that are gone or cut off, and the rows of them that nothing else shows.

Takes the store and a `Candidate`. Reads indexes of lost receipts, and those of receipts that have the same inputs now.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.ledger.copies import copy_of
from pipeline.ledger.manifest import read_batches, read_table
from pipeline.ledger.receipts import retired_shards, stored_index
from pipeline.ledger.summary import uri_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.format.index import IndexRow
    from pipeline.ledger.candidate import Candidate
    from pipeline.ledger.copies import Copy
    from pipeline.ledger.decisions import Decisions
    from pipeline.storage import Store

READ = ["index_key", "shard_id", "fingerprint", "hidden"]
RECORDED = 1000  # shards named in a snapshot's record
Left = dict[tuple[str, str], list["IndexRow"]]
"""By fingerprint and shard: rows that counted and that no takedown hides."""


@dataclass(frozen=True, slots=True)
class LostReceipts:
    """Shard ids, sorted. `rows`: those of `costly` that are known to count nowhere else."""

    replaced: list[str]  # all rows were taken down, or their inputs encoded again
    costly: list[str]  # the others, and receipts without rows: their counts and decisions are lost
    rows: int

    def __bool__(self) -> bool:
        return bool(self.replaced or self.costly)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the record of a snapshot that leaves them out."""
        shards = sorted([*self.replaced, *self.costly])
        return {"count": len(shards), "costly": len(self.costly), "rows": self.rows, "shards": shards[:RECORDED]}


def lost_receipts(store: Store, candidate: Candidate, fingerprint: str = "") -> LostReceipts:
    """Receipts of fingerprints with this prefix that are lost."""
    if candidate.parent_receipts is None:
        return LostReceipts([], [], 0)
    known = read_table(candidate.parent_receipts, ["shard_id", "fingerprint"])
    lost = known.filter(pc.invert(pc.is_in(known["shard_id"], candidate.decisions.shards)))
    lost = lost.filter(pc.starts_with(lost["fingerprint"], fingerprint))["shard_id"].to_pylist()
    if not lost:
        return LostReceipts([], [], 0)
    left, unread = _rows_that_counted(store, candidate, lost)
    shown = {shard for _, shard in left}
    retired = retired_shards(store)
    lost = [shard for shard in lost if shard in shown or shard not in retired]  # `lathe gc` retires what nothing shows
    for (name, shard), rows in _without_named_again(candidate.decisions, left).items():
        shown = _ids_shown(store, candidate, name, {uri_id(row.source_uri) for row in rows}) if rows else set()
        left[name, shard] = [row for row in rows if row.id not in shown]
    with_rows = {shard: len(rows) for (_, shard), rows in left.items()}
    replaced = sorted(shard for shard, rows in with_rows.items() if not rows and shard not in unread)
    return LostReceipts(replaced, sorted(set(lost) - set(replaced)), sum(with_rows.values()))


def _rows_that_counted(store: Store, candidate: Candidate, lost: list[str]) -> tuple[Left, set[str]]:
    """Rows of lost receipts, and the shards of which an index is lost too."""
    takedowns, shards = candidate.decisions.overlaps.takedowns, pa.array(lost, pa.string())
    left: Left = defaultdict(list)
    unread = set()
    for batch in read_batches(candidate.parent_files, READ) if candidate.parent_files is not None else ():
        for file in batch.filter(pc.is_in(batch["shard_id"], shards)).to_pylist():
            hidden, name = set(file["hidden"]), (file["fingerprint"], file["shard_id"])
            try:
                rows = stored_index(store, file["index_key"])
            except (NotFound, OutputError):
                unread.add(file["shard_id"])
                rows = []
            left[name] += [row for row in rows if row.row not in hidden and not takedowns.hides(row)]
    for file, shard, copied in copied_rows(store, candidate, shards):
        if copied is None:
            unread.add(shard)
        hidden, name = set(file["hidden"]), (file["fingerprint"], shard)
        left[name] += [row for row in copied or () if row.row not in hidden and not takedowns.hides(row)]
    return left, unread


def copied_rows(
    store: Store, candidate: Candidate, shards: pa.Array
) -> Iterator[tuple[dict[str, Any], str, list[IndexRow] | None]]:
    """Compacted files of the parent with the rows of these receipts in them: row of `READ`, shard, index rows; None if unreadable."""
    copies = [copy_of(row) for row in _of_shards(candidate.copies.table, shards).to_pylist()]
    by_file: dict[str, list[tuple[str, Copy]]] = defaultdict(list)
    names = _of_shards(candidate.copies.table, shards)["shard_id"].to_pylist() if copies else []
    for shard, copy in zip(names, copies, strict=True):
        by_file[copy.file.index_key].append((shard, copy))
    keys = pa.array(by_file, pa.string())
    for batch in read_batches(candidate.parent_files, READ) if by_file and candidate.parent_files is not None else ():
        for file in batch.filter(pc.is_in(batch["index_key"], keys)).to_pylist():
            for shard, copy in by_file[file["index_key"]]:
                try:
                    yield file, shard, candidate.copies.rows(store, copy)
                except (NotFound, OutputError):
                    yield file, shard, None


def _of_shards(copies: pa.Table, shards: pa.Array) -> pa.Table:
    return copies.filter(pc.is_in(copies["shard_id"], shards))


def _without_named_again(decisions: Decisions, left: Left) -> Left:
    """The same without rows of inputs that a receipt names which the parent does not cover."""
    again = {name: decisions.named_since(name) for name in {name for name, _ in left}}
    return {
        (name, shard): [row for row in rows if uri_id(row.source_uri) not in again[name]]
        for (name, shard), rows in left.items()
    }


def _ids_shown(store: Store, candidate: Candidate, fingerprint: str, uris: set[bytes]) -> set[str]:
    """Ids of rows that count, of receipts that have one of these inputs."""
    shards = pa.array(_owners(candidate.decisions, fingerprint, uris), pa.string())
    files = candidate.files.select(READ)
    files = files.filter(pc.and_(pc.equal(files["fingerprint"], fingerprint), pc.is_in(files["shard_id"], shards)))
    return set(_shown(store, files.to_pylist()))


def _owners(decisions: Decisions, fingerprint: str, uris: set[bytes]) -> set[str]:
    chosen = decisions.selection.versions.get(fingerprint, {})
    found = {shard for uri in uris if (shard := chosen.get(uri)) is not None}
    wanted = np.frombuffer(b"".join(uris), "<u8")
    for shard, names in zip(decisions.plain_shards, decisions.plain_uris, strict=True):
        if np.isin(np.frombuffer(names.as_py(), "<u8"), wanted).any():
            found.add(shard.as_py())
    return found


def _shown(store: Store, files: Iterable[dict[str, Any]]) -> Iterator[str]:
    for file in files:
        hidden = set(file["hidden"])
        try:
            yield from (row.id for row in stored_index(store, file["index_key"]) if row.row not in hidden)
        except (NotFound, OutputError):  # `files_check` reports it
            continue

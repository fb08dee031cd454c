"""Which part of each receipt the next snapshot counts. Takes summaries of receipts as a Parquet file: 100,000 need no object each.

A receipt is plain if it shares no input with another receipt of its fingerprint, is neither a retry nor "unchanged", is not named by one,
and no takedown, earlier choice or dropped input touches it: all its rows count. `overlaps` and `versions` decide on the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.copies import NO_COPIES
from pipeline.ledger.manifest import ROWS_AT_ONCE, read_table
from pipeline.ledger.overlaps import Overlaps, whole_state
from pipeline.ledger.summary import ID_BYTES, URI_BYTES, first_of_each_shard, source_id, uri_id
from pipeline.ledger.summary_tables import read_summaries
from pipeline.ledger.versions import hide_other_versions, select_versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipeline.ledger.copies import Copies
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.ledger.versions import Choices, Selection
    from pipeline.records import SourceObject

COLUMNS = ["key", "shard_id", "fingerprint", "attempt", "uris", "retry", "same_as"]
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so that fingerprints with one URI get different numbers


@dataclass(slots=True)
class Decisions:
    """Receipts that may be published, one a shard: rows of `shards`, `keys` and `states` belong together."""

    overlaps: Overlaps  # of receipts that are not plain; `counted` is right for all
    selection: (
        Selection  # versions and choices of inputs of receipts that are not plain; changes and open sources of all
    )
    shards: pa.Array  # string
    keys: pa.Array  # string: of the receipt objects
    states: pa.Array  # binary(8): see `Overlaps.state`
    repeated: pa.Array  # shards with several receipts
    plain_shards: pa.Array
    plain_uris: pa.Array  # `uri_id` of each object, concatenated
    new: (
        pa.Table | None
    )  # fingerprint, uris, retry of receipts that the parent does not cover; None: there is no parent
    fingerprints: list[str]  # of all receipts of the output, sorted
    current: str | None  # fingerprint of the newest of these receipts; None: not asked for
    num_inputs: int  # inputs of these receipts, by (fingerprint, URI), without those that an earlier snapshot dropped

    def key(self, shard: str) -> str:
        """Key of the receipt of a shard that is in `shards`."""
        return str(self.keys[pc.index(self.shards, shard).as_py()].as_py())

    def named_since(self, fingerprint: str | None = None) -> set[bytes]:
        """`uri_id` of every input that a receipt names which the parent does not cover, retries left out; of one fingerprint, or all."""
        if self.new is None:
            return set()
        mine = self.new.filter(pc.is_null(self.new["retry"]))
        if fingerprint is not None:
            mine = mine.filter(pc.equal(mine["fingerprint"], fingerprint))
        return {
            data[at : at + URI_BYTES]
            for data in (item.as_py() for item in mine["uris"])
            for at in range(0, len(data), URI_BYTES)
        }

    def version_names(self) -> Iterator[bytes]:
        """`uri_id` and shard of every input that counts."""
        for found in self.selection.versions.values():
            yield from (uri + str(shard).encode() for uri, shard in found.items() if shard is not None)
        for shard, uris in zip(self.plain_shards, self.plain_uris, strict=True):
            name, data = shard.as_py().encode(), uris.as_py()
            yield from (data[at : at + URI_BYTES] + name for at in range(0, len(data), URI_BYTES))


def decide(
    path: Path,
    takedowns: Takedowns,
    covered: pa.Array | None,
    before: Choices,
    listing: Sequence[SourceObject] | None = None,
    *,
    fingerprint: str | None = None,
    drop_missing: bool = False,
    only_covered: bool = False,
    copies: Copies = NO_COPIES,
) -> Decisions:
    """Applies the rules of `overlaps` and `versions`.

    Args:
        path: summaries as `Summaries.spool` writes them.
        takedowns: of the output.
        covered: ids of shards that the parent snapshot covers; None: there is no parent.
        before: `choices` of the parent.
        listing: the inputs as they are now; None: not known.
        fingerprint: only receipts of fingerprints that begin so; None: all.
        drop_missing: whether inputs that are not listed are dropped.
        only_covered: only receipts that the parent covers, as if there were no others.
        copies: of rows of receipts.
    """
    columns = COLUMNS if listing is None else [*COLUMNS, "sources", "created"]
    table = read_table(path, columns)
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    fingerprints = sorted(table["fingerprint"].unique().to_pylist())
    if fingerprint:
        table = table.filter(pc.starts_with(table["fingerprint"], fingerprint))
    if only_covered and covered is not None:
        table = table.filter(pc.is_in(table["shard_id"], covered))
    table, repeated = _one_a_shard(table, path)
    touched = {uri for found in before.values() for uri in found} | takedowns.uri_ids()
    wanted = {uri_id(source.uri) for source in listing} if listing is not None and drop_missing else None
    current = None if listing is None else _newest(table)
    mixed = _entangled(table, touched, wanted)
    others = table.filter(pa.array(mixed))
    overlaps = Overlaps(read_summaries(path, others["row"].to_numpy()), takedowns, copies)
    known = None if covered is None else set(_among(others["shard_id"], covered).to_pylist())
    selection = select_versions(overlaps, known, before, listing, drop_missing=drop_missing, current=current)
    hide_other_versions(overlaps, selection.versions)
    special = {item.shard_id: overlaps.state(item) for item in overlaps.by_shard.values()}
    overlaps.forget_summaries()
    states = _states(table.select(["shard_id", "attempt"]), special)
    plain = table.filter(pa.array(~mixed))
    new, since = plain, None
    if covered is not None:
        new = plain.filter(pc.invert(pc.is_in(plain["shard_id"], covered)))
        since = table.select(["fingerprint", "uris", "retry"])
        since = since.filter(pc.invert(pc.is_in(table["shard_id"], covered)))
    selection.changes.added += _num_uris(new)
    if listing is not None:
        done = plain["sources"].filter(pc.equal(plain["fingerprint"], current or ""))
        left = _unknown(selection.open_sources, done)
        selection.open_sources = [source for source in left if not takedowns.takes_any_of(source)]  # never encoded
    return Decisions(
        overlaps=overlaps,
        selection=selection,
        shards=_array(table["shard_id"]),
        keys=_array(table["key"]),
        states=states,
        repeated=repeated,
        plain_shards=_array(plain["shard_id"]),
        plain_uris=_array(plain["uris"]),
        new=since,
        fingerprints=fingerprints,
        current=current,
        num_inputs=_num_uris(plain) + _num_counting(selection),
    )


def _among(values: pa.ChunkedArray, wanted: pa.Array) -> pa.ChunkedArray:
    return values.filter(pc.is_in(values, wanted))


def _newest(table: pa.Table) -> str | None:
    """Fingerprint of the receipt that was made last: the settings under which inputs are encoded now."""
    if not table.num_rows:
        return None
    place = pc.index(table["created"], pc.max(table["created"])).as_py()
    return str(table["fingerprint"][place].as_py())


def _num_uris(table: pa.Table) -> int:
    return (pc.sum(pc.binary_length(table["uris"])).as_py() or 0) // URI_BYTES


def _num_counting(selection: Selection) -> int:
    """Inputs of `selection` that count, and those that it dropped now."""
    counting = sum(shard is not None for found in selection.versions.values() for shard in found.values())
    return counting + sum(map(len, selection.dropped.values()))


def _states(table: pa.Table, special: dict[str, bytes]) -> pa.Array:
    """`Overlaps.state` of each receipt; `special`: of those that are not plain."""
    found = [pa.array([], pa.binary(8))]
    for batch in table.to_batches(ROWS_AT_ONCE):
        rows = zip(*(column.to_pylist() for column in batch), strict=True)
        found.append(pa.array([special.get(shard) or whole_state(attempt) for shard, attempt in rows], pa.binary(8)))
    return pa.concat_arrays(found)


def _one_a_shard(table: pa.Table, path: Path) -> tuple[pa.Table, pa.Array]:
    """Rows of receipts that count for their shard, and the shards that had several."""
    if pc.count_distinct(table["shard_id"]).as_py() == table.num_rows:
        return table, pa.array([], pa.string())
    counts = pc.value_counts(table["shard_id"])
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    several = pc.is_in(table["shard_id"], repeated)
    first = {item.key for item in first_of_each_shard(read_summaries(path, table.filter(several)["row"].to_numpy()))}
    counting = pc.or_(pc.invert(several), pc.is_in(table["key"], pa.array(first, pa.string())))
    return table.filter(counting), repeated


def _entangled(table: pa.Table, touched: set[bytes], listed: set[bytes] | None) -> np.ndarray:
    """Mask `(receipts,)`, bool: whether a receipt is not plain. `touched`: URIs that make it so; `listed`: all others do."""
    mask = np.zeros(table.num_rows, bool)
    uris = np.frombuffer(b"".join(table["uris"].to_pylist()), "<u8")
    rows = np.repeat(np.arange(table.num_rows), pc.binary_length(table["uris"]).to_numpy() // URI_BYTES)
    codes = _array(table["fingerprint"]).dictionary_encode().indices.to_numpy().astype(np.uint64) * SPREAD
    within = uris ^ codes[rows]
    order = np.argsort(within)
    equal = within[order[1:]] == within[order[:-1]]
    mask[rows[order[1:][equal]]] = mask[rows[order[:-1][equal]]] = True
    if touched:
        mask[rows[np.isin(uris, np.frombuffer(b"".join(touched), "<u8"))]] = True
    if listed is not None:
        mask[rows[~np.isin(uris, np.frombuffer(b"".join(listed), "<u8"))]] = True
    named: set[str] = set()
    for name in ("retry", "same_as"):
        texts = table[name]
        mask |= texts.is_valid().to_numpy()
        for text in texts.drop_null().to_pylist():
            found = json.loads(text)
            named.update([found["base"]] if name == "retry" else found)
    if named:
        mask |= pc.is_in(table["shard_id"], pa.array(named, pa.string())).to_numpy()
    return mask


def _unknown(sources: list[SourceObject], known: pa.ChunkedArray) -> list[SourceObject]:
    """Those sources that no plain receipt has."""
    ids = np.frombuffer(b"".join(known.to_pylist()), f"V{ID_BYTES}")
    mine = np.frombuffer(b"".join(map(source_id, sources)), f"V{ID_BYTES}")
    found = pc.is_in(pa.array(mine.tolist(), pa.binary()), pa.array(ids.tolist(), pa.binary()))
    return [source for source, there in zip(sources, found.to_pylist(), strict=True) if not there]


def _array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)

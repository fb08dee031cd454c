"""History of one input: where it lies, which receipts name it, its rows or rejects, which snapshots show it, takedowns, running builds.

Takes a store and a name; returns a JSON-ready dict. `name_search` finds the receipts that name the input; only they are read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, LatheError, NotFound
from pipeline.format.columns import storable
from pipeline.ledger.copies import NO_COPIES
from pipeline.ledger.overlaps import Overlaps
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.row_search import FoundRow
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedowns import Takedowns, read_takedowns
from pipeline.operate.member_search import mains_of
from pipeline.operate.name_search import NameSearch
from pipeline.operate.open_input import open_input
from pipeline.operate.run_logs import run_logs
from pipeline.operate.takedown_names import spelled
from pipeline.records import variant_names
from pipeline.storage import stat_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import StorageConfig
    from pipeline.format.index import IndexRow
    from pipeline.ledger.copies import Copies
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.ledger.takedown_record import Takedown
    from pipeline.ledger.takedowns import NamedRow
    from pipeline.records import Receipt, SourceObject
    from pipeline.storage import Store

LISTED = 20  # rows and rejects of a receipt, inputs of a name
SNAPSHOTS_LOOKED = 32  # the newest


def why(store: Store, name: str, storage: StorageConfig) -> dict[str, Any]:
    """What became of an input, a sample of a tar, or a row.

    `state` is one of encoded, rejected, taken_down, superseded (nothing of it counts), retired (as before, and `lathe gc` moved its
    receipt), running, waiting, given_up, pending, open, passed_over (a file of another kind in a folder of inputs).

    Args:
        store: the output.
        name: URI or path of an input, or of a paired video beside one, `URI#KEY` or key of a sample, or id of a row.
        storage: to look whether the input is still there.

    Raises:
        OutputError: not a latent set, or a receipt that cannot be read.
        InputError: several inputs have the name, or none has it; the message has their or similar names.
    """
    Ledger(store).latent_set()
    takedowns = read_takedowns(store)
    with NameSearch(store, name, takedowns) as search:
        uri = spelled(name)
        key: str | None = None
        row_id: str | None = None
        named = search.naming({name, uri})
        if not named:
            if (row := search.row()) is not None:
                (uri, key), row_id = row, name
            elif samples := search.samples():
                uri, key = _one(samples)
            elif mains := [main for found in mains_of(store, {name, uri}).values() for main in found]:
                uri = mains[0]  # of a paired video, which has no row of its own
            named = search.naming([uri])
        if not named:
            return _unfinished(store, search, storage, uri, _hiding(takedowns, [_asked(uri, key, row_id)]))
        return _InputHistory(store, storage, takedowns, named, {storable(name), storable(uri)}, key, row_id).collect()


def _one(samples: list[tuple[str, str]]) -> tuple[str, str]:
    if len(samples) > 1:
        shown = ", ".join(f"{uri}#{key}" for uri, key in samples[:LISTED])
        raise InputError(f"{len(samples)} inputs have a sample {samples[0][1]!r}; name one of {shown}")
    return samples[0]


def _asked(uri: str, key: str | None, row_id: str | None) -> FoundRow:
    """An input, a sample or a row as takedowns look at it."""
    return FoundRow(row_id or "", storable(uri), storable(key or ""))


def _hiding(takedowns: Takedowns, rows: Sequence[NamedRow]) -> list[Takedown]:
    """Takedowns that hide one of these rows, in order of time."""
    keys = set(takedowns.keys_for([uri_id(row.source_uri) for row in rows]))
    records = (record for record in takedowns.records if record.key in keys)
    return [record for record in records if any(map(Takedowns([record]).hides, rows))]


def _unfinished(
    store: Store, search: NameSearch, storage: StorageConfig, uri: str, taking: list[Takedown]
) -> dict[str, Any]:
    """An input, or the input of a row, without a receipt: what takedowns, retired receipts, builds and the newest snapshot know of it.

    Raises:
        InputError: they do not know it.
    """
    where = {"uri": uri, **_there(uri, storage)}
    found = open_input(store, uri, there=where["there"])
    if taking:
        found = {"builds": [], "open_in": None, "note": None, "retired": [], **(found or {}), "state": "taken_down"}
    if found is None:
        near = search.near()
        similar = f"similar names: {', '.join(near)}" if near else "no name is similar"
        raise InputError(
            f"{search.name} is not known to {store.root}: no receipt, no row, no build and no snapshot names it; {similar}"
        )
    empty: dict[str, Any] = {"key": None, "versions": [], "snapshots": [], "snapshots_looked": []}
    return {
        "output": store.root,
        "name": search.name,
        "where": where,
        **empty,
        "takedowns": _recorded(taking),
        **found,
    }


def _recorded(takedowns: list[Takedown]) -> list[dict[str, str]]:
    return [{"key": item.key, "created": item.created, "reason": item.reason, "by": item.by} for item in takedowns]


def _there(uri: str, storage: StorageConfig) -> dict[str, Any]:
    """Whether the input exists now, with its size and etag; `there` is None where the store does not say."""
    try:
        info = stat_uri(uri, storage)
    except NotFound:
        return {"there": False}
    except LatheError as error:
        return {"there": None, "note": error.message}
    return {"there": True, "size": info.size, "etag": info.etag}


class _InputHistory:
    """Collects what receipts, indexes, snapshots and takedowns say of one input. `uris`: spellings, as in rows."""

    def __init__(
        self,
        store: Store,
        storage: StorageConfig,
        takedowns: Takedowns,
        named: list[ReceiptSummary],
        uris: set[str],
        key: str | None,
        row_id: str | None,
    ) -> None:
        self._store, self._storage = store, storage
        self._named, self._uris = named, uris
        self._key, self._row_id = key, row_id
        self._takedowns = takedowns
        self._copies = published_copies(store)
        self._overlaps = Overlaps(named, self._takedowns, self._copies)
        self._ledger = Ledger(store)
        self._builds = list(run_logs(store, self._ledger.layout))
        self._receipts: list[Receipt] = []
        self._indexes: dict[str, list[IndexRow]] = {}

    def collect(self) -> dict[str, Any]:
        """All of it, oldest receipt first."""
        versions, rows = [], []
        for item in sorted(self._named, key=lambda found: found.precedence):
            if (receipt := self._ledger.load(item.key)) is not None:
                self._receipts.append(receipt)
                mine = [(key, row) for key, row in self._places(receipt, self._copies) if self._wanted(row)]
                rows += [row for _, row in mine]
                versions.append(self._version(item, self._overlaps.counted(receipt), mine))
        uri = str(versions[0]["source"]["uri"])
        where = {"uri": uri, **_there(uri, self._storage)}
        where["changed"] = where.get("etag") not in (None, *(version["source"]["etag"] for version in versions))
        takedowns = self._naming(rows)
        snapshots, looked = self._snapshots()
        return {
            "output": self._store.root,
            "name": self._row_id or self._key or uri,
            "key": self._key,
            "state": _state(versions, taken=self._takedowns.takes(uri) or self._is_gone(rows, takedowns)),
            "where": where,
            "versions": versions,
            "snapshots": snapshots,
            "snapshots_looked": looked,
            "takedowns": _recorded(takedowns),
        }

    def _is_gone(self, rows: list[IndexRow], takedowns: list[Takedown]) -> bool:
        """Whether a sample or row was taken down and its file rewritten: no row of it is left."""
        return not rows and bool(takedowns) and (self._key is not None or self._row_id is not None)

    # --- receipts -----------------------------------------------------------------------------------------------------

    def _version(self, item: ReceiptSummary, part: CountedReceipt, rows: list[tuple[str, IndexRow]]) -> dict[str, Any]:
        """What one receipt says. `rows` and `rejects` list at most `LISTED`; `num_rows` and `num_rejects` count all."""
        receipt = part.receipt
        source = next(each for each in receipt.shard.objects if storable(each.uri) in self._uris)
        rejects = [each for each in receipt.rejects if each.uri == source.uri and self._wanted_key(each.key)]
        fps = {each.bucket: each.ranges.get("fps") for each in receipt.files}
        return {
            "fingerprint": receipt.fingerprint,
            "clip_rules": receipt.fingerprint_parts.get("clips"),
            "variants": list(variant_names(receipt.fingerprint_parts)),
            "shard": receipt.shard.name,
            "shard_id": receipt.shard_id,
            "receipt": item.key,
            "created": receipt.created,
            "build": next((name for name in self._builds if name.endswith(f"-{receipt.attempt[:8]}")), None),
            "source": asdict(source),
            "retry_of": None if receipt.shard.retry is None else receipt.shard.retry.base,
            "same_as": receipt.same_as.get(source.uri),
            "counts": self._counts(part, source),
            "num_rows": len(rows),
            "num_taken_down": sum(self._takedowns.hides(row) for _, row in rows),
            "rows": [_row(file, row, fps.get(row.bucket)) for file, row in rows[:LISTED]],
            "num_rejects": len(rejects),
            "rejects": [each.to_dict() for each in rejects[:LISTED]],
        }

    def _places(self, receipt: Receipt, copies: Copies) -> list[tuple[str, IndexRow]]:
        """Rows of a receipt with the data file that has them now: its own, or the one into which a compaction copied them."""
        moved = copies.of(receipt.shard_id)
        found = []
        for item in receipt.files:
            for copy in moved.get(item.key, ()):
                found += [(copy.file.key, row) for row in copies.rows(self._store, copy)]
            if item.key not in moved:
                found += [(item.key, row) for row in self._index(item.index_key)]
        return found

    def _index(self, key: str) -> list[IndexRow]:
        """Rows of an index; none if it was deleted, because its rows were taken down or copied."""
        if key not in self._indexes:
            try:
                self._indexes[key] = stored_index(self._store, key)
            except NotFound:
                self._indexes[key] = []
        return self._indexes[key]

    def _wanted(self, row: IndexRow) -> bool:
        if row.source_uri not in self._uris:
            return False
        return row.id == self._row_id if self._row_id is not None else self._wanted_key(row.source_key)

    def _wanted_key(self, key: str | None) -> bool:
        if self._row_id is not None and key is None:
            return False
        return self._key is None or (key is not None and storable(key) == storable(self._key))

    def _counts(self, part: CountedReceipt, source: SourceObject) -> bool:
        """Whether the input, or the sample, counts in this receipt; else another receipt counts."""
        if part.superseded or source.uri in part.hidden_uris:
            return False
        return self._key is None or part.counts(source.uri, self._key)

    def _naming(self, rows: list[IndexRow]) -> list[Takedown]:
        """Takedowns that name this input or a part of it, the sample, or a row of it."""
        if self._key is None and self._row_id is None:
            keys = self._takedowns.keys_for([*map(uri_id, self._uris)])
            return [record for record in self._takedowns.records if record.key in keys]
        return _hiding(self._takedowns, [*(_asked(uri, self._key, self._row_id) for uri in self._uris), *rows])

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _snapshots(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Snapshots that name rows of the input: how many they show, and how many takedowns hide. And the numbers of those that were
        looked at, the newest.
        """
        looked = Snapshots(self._store).numbers()[-SNAPSHOTS_LOOKED:]
        found: list[dict[str, Any]] = []
        for number in looked:
            try:
                rows = self._rows_of(number)
            except LatheError as error:  # one damaged snapshot must not hide what the others say
                found.append({"number": number, "rows": None, "note": error.message})
                continue
            taken = sum(map(self._takedowns.hides, rows))
            if rows:
                found.append({"number": number, "rows": len(rows) - taken, "taken_down": taken})
        return found, looked

    def _rows_of(self, number: int) -> list[IndexRow]:
        """Rows that a snapshot does not hide itself."""
        snapshots = Snapshots(self._store)
        snapshot = snapshots.read(number)
        copies = published_copies(self._store, number) if "copies" in snapshot.tables else NO_COPIES
        places = [
            place for receipt in self._receipts for place in self._places(receipt, copies) if self._wanted(place[1])
        ]
        table = snapshots.table(snapshot, "files", ["key", "hidden"])
        mine = table.filter(pc.is_in(table["key"], pa.array(sorted({file for file, _ in places}), pa.string())))
        pairs = zip(mine["key"].to_pylist(), mine["hidden"].to_pylist(), strict=True)
        hidden = {key: set(positions) for key, positions in pairs}
        return [row for file, row in places if file in hidden and row.row not in hidden[file]]


def _row(file: str, row: IndexRow, fps: list[Any] | None) -> dict[str, Any]:
    """A row as it is shown. Its exact fps is in its file; where all rows of the bucket have one value it is that."""
    return {
        "id": row.id,
        "source_key": row.source_key,
        "bucket": row.bucket,
        "num_frames": row.num_frames,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "file": file,
        "row": row.row,
        "bytes": sum(span.length for span in row.spans()),
        "fps": fps[0] if fps and fps[0] == fps[1] else fps,
    }


def _state(versions: list[dict[str, Any]], *, taken: bool) -> str:
    counting = [version for version in versions if version["counts"]]
    rows = sum(version["num_rows"] for version in counting)
    if taken or (rows and rows == sum(version["num_taken_down"] for version in counting)):
        return "taken_down"
    if rows or any(version["same_as"] for version in counting):
        return "encoded"
    if any(version["num_rejects"] for version in counting):
        return "rejected"
    return "superseded" if any(version["num_rows"] for version in versions) else "rejected"

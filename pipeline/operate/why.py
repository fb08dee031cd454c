"""The story of one input: where it lies, which receipts name it, its rows or rejects, which snapshots show it, takedowns, running builds.

Takes a store and a key, URI or row id; returns a JSON-ready dict. `name_search` finds the receipts that name the input; only they are read.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, LatheError, NotFound
from pipeline.format.columns import storable
from pipeline.ledger.overlaps import Overlaps
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate.name_search import IndexedFile, NameSearch
from pipeline.operate.open_input import open_input
from pipeline.operate.run_logs import run_logs
from pipeline.storage import is_remote, locate, stat_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import StorageConfig
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.ledger.takedowns import Takedown, Takedowns
    from pipeline.records import SourceObject
    from pipeline.storage import Store

LISTED = 20  # rows and rejects of a receipt that are listed
SNAPSHOTS_LOOKED = 32  # the newest


def why(
    store: Store, name: str, *, storage: StorageConfig, source: str | None = None, workers: int | None = None
) -> dict[str, Any]:
    """What became of an input, a sample of a tar, or a row.

    `state` is one of encoded, rejected, taken_down, superseded (nothing of it counts), running, waiting, given_up, pending, open, unknown.

    Args:
        store: the output.
        name: key of a sample, URI or path of an input, or id of a row.
        storage: to look whether the input is still there.
        source: URI or path of the input, where several have a sample of this key.
        workers: threads that read receipts and indexes.

    Raises:
        OutputError: not a latent set, or a receipt that cannot be read.
        InputError: several inputs have the name, or none has it; the message has their or similar names.
    """
    ledger = Ledger(store)
    ledger.latent_set()
    threads = workers or (16 if is_remote(store.root) else 1)
    with NameSearch(store, name, spellings(name), threads) as search:
        key: str | None = None
        row_id: str | None = None
        uris = spellings(source) if source else search.uris
        named = search.naming(uris)
        if source and not named:
            raise InputError(f"{source} is not an input that a receipt of {store.root} names; {_near(search)}")
        if source or not named:
            found = search.find()
            inputs = [uri for uri in found.uris() if not source or uri in map(storable, uris)]
            if len(inputs) > 1:
                shown = ", ".join(inputs[:LISTED])
                raise InputError(f"{len(inputs)} inputs have a sample {name!r}: {shown}; name one with --source")
            if inputs:
                key = found.rows[0]["source_key"] if found.rows else name
                row_id = name if found.rows and all(row["id"] == name for row in found.rows) else None
                uris, named = inputs, search.naming(inputs)
            elif source:
                raise InputError(f"{source} has no sample {name!r} that was encoded or rejected; {_near(search)}")
        if not named:
            return _unfinished(store, search, storage)
        return _Story(store, search, storage, named, uris, key, row_id).told()


def spellings(name: str) -> list[str]:
    """The name as inputs may be spelled in receipts: as it is, and a path as an absolute one."""
    if is_remote(name):
        return [name]
    folder, base = locate(name)
    return list(dict.fromkeys([os.path.join(folder, base), name]))


def _near(search: NameSearch) -> str:
    near = search.near()
    return f"similar names: {', '.join(near)}" if near else "no name is similar"


def _unfinished(store: Store, search: NameSearch, storage: StorageConfig) -> dict[str, Any]:
    """An input without a receipt: what builds and the newest snapshot know of it.

    Raises:
        InputError: they do not know it.
    """
    found = open_input(store, search.uris, search.snapshot)
    if found is None:
        raise InputError(
            f"{search.uris[-1]} is not known to {store.root}: no receipt, no row, no build and no snapshot names it; {_near(search)}"
        )
    uri = search.uris[0]
    where = {"uri": uri, **_there(uri, storage)}
    return {
        "output": store.root,
        "name": search.uris[-1],
        "key": None,
        "where": where,
        "versions": [],
        "snapshots": [],
    } | {
        "takedowns": [],
        **found,
    }


def _there(uri: str, storage: StorageConfig) -> dict[str, Any]:
    """Whether the input exists now, with its size and etag; `there` is None where the store does not say."""
    try:
        info = stat_uri(uri, storage)
    except NotFound:
        return {"there": False}
    except LatheError as error:
        return {"there": None, "note": error.message}
    return {"there": True, "size": info.size, "etag": info.etag}


class _Story:
    """Collects what receipts, indexes, snapshots and takedowns say of one input."""

    def __init__(
        self,
        store: Store,
        search: NameSearch,
        storage: StorageConfig,
        named: list[ReceiptSummary],
        uris: Sequence[str],
        key: str | None,
        row_id: str | None,
    ) -> None:
        self._store, self._search, self._storage = store, search, storage
        self._named, self._uris = named, set(map(storable, uris))
        self._key, self._row_id = key, row_id
        self._takedowns: Takedowns = read_takedowns(store)
        self._overlaps = Overlaps(named, self._takedowns)
        self._ledger = Ledger(store)
        self._builds = list(run_logs(store, self._ledger.layout))

    def told(self) -> dict[str, Any]:
        """The story, oldest receipt first."""
        versions = []
        for item in sorted(self._named, key=lambda found: found.precedence):
            part = self._overlaps.counted(receipt) if (receipt := self._ledger.load(item.key)) is not None else None
            if part is not None:
                versions.append(self._version(item, part))
        uri = next(version["source"]["uri"] for version in versions)
        where = {"uri": uri, **_there(uri, self._storage)}
        where["changed"] = where.get("etag") not in (None, *(version["source"]["etag"] for version in versions))
        ids = {row_id for version in versions for _, _, row_id in version["all_rows"]}
        takedowns = [record for record in self._takedowns.records if self._names(record, ids)]
        snapshots, looked = self._snapshots(versions)
        return {
            "output": self._store.root,
            "name": self._row_id or self._key or uri,
            "key": self._key,
            "state": _state(versions),
            "where": where,
            "versions": versions,
            "snapshots": snapshots,
            "snapshots_looked": looked,
            "takedowns": [{"key": item.key, "created": item.created, "reason": item.reason} for item in takedowns],
        }

    def _version(self, item: ReceiptSummary, part: CountedReceipt) -> dict[str, Any]:
        """What one receipt says. `rows` and `rejects` list at most `LISTED`; `num_rows` and `num_rejects` count all."""
        receipt = part.receipt
        source = next(each for each in receipt.shard.objects if storable(each.uri) in self._uris)
        files = [IndexedFile(each.key, each.index_key, each.ranges) for each in receipt.files]
        rows = [row for row in self._search.rows_of(files, source.uri) if self._wanted(row["source_key"], row["id"])]
        rejects = [each for each in receipt.rejects if each.uri == source.uri and self._wanted(each.key, None)]
        hidden = [row for row in rows if self._taken(row)]
        fps = {each.key: each.ranges.get("fps") for each in receipt.files}
        return {
            "fingerprint": receipt.fingerprint,
            "clip_rules": receipt.fingerprint_parts.get("clips"),
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
            "num_taken_down": len(hidden),
            "rows": [_row(row, fps.get(row["file"])) for row in rows[:LISTED]],
            "num_rejects": len(rejects),
            "rejects": [asdict(each) for each in rejects[:LISTED]],
            "all_rows": [(row["file"], row["row"], row["id"]) for row in rows],
        }

    def _wanted(self, key: str | None, row_id: str | None) -> bool:
        if self._row_id is not None and row_id is not None:
            return row_id == self._row_id
        return self._key is None or (key is not None and storable(key) == storable(self._key))

    def _counts(self, part: CountedReceipt, source: SourceObject) -> bool:
        """Whether the input, or the sample, counts in this receipt; else another receipt counts."""
        if part.superseded:
            return False
        return source.uri not in part.hidden_uris and (self._key is None or part.counts(source.uri, self._key))

    def _taken(self, row: dict[str, Any]) -> bool:
        return any(self._record_hides(record, row) for record in self._takedowns.records)

    def _record_hides(self, record: Takedown, row: dict[str, Any]) -> bool:
        uri, key = row["source_uri"], row["source_key"]
        return (
            uri in map(storable, record.sources)
            or (uri, key) in {(storable(a), storable(b)) for a, b in record.samples}
            or row["id"] in {each.id for each in record.rows}
        )

    def _names(self, record: Takedown, ids: set[str]) -> bool:
        """Whether a takedown names this input, the sample, or a row of it."""
        samples = [(storable(uri), storable(key)) for uri, key in record.samples]
        return (
            bool(self._uris & set(map(storable, record.sources)))
            or any(uri in self._uris and self._wanted(key, None) for uri, key in samples)
            or any(row.id in ids for row in record.rows)
        )

    def _snapshots(self, versions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Snapshots that show rows of the input, with how many; and the numbers of those that were looked at, the newest."""
        rows = {(file, row): row_id for version in versions for file, row, row_id in version.pop("all_rows")}
        snapshots = Snapshots(self._store)
        looked = snapshots.numbers()[-SNAPSHOTS_LOOKED:]
        found = []
        files = pa.array(sorted({file for file, _ in rows}), pa.string())
        for number in looked if rows else ():
            try:
                table = snapshots.table(snapshots.read(number), "files", ["key", "hidden"])
            except LatheError as error:  # one damaged snapshot must not hide what the others say
                found.append({"number": number, "rows": None, "note": error.message})
                continue
            mine = table.filter(pc.is_in(table["key"], files))
            pairs = zip(mine["key"].to_pylist(), mine["hidden"].to_pylist(), strict=True)
            hidden = {key: set(positions) for key, positions in pairs}
            shown = sum(file in hidden and row not in hidden[file] for file, row in rows)
            if shown:
                found.append({"number": number, "rows": shown})
        return found, looked


def _row(row: dict[str, Any], fps: list[Any] | None) -> dict[str, Any]:
    """A row as it is shown. Its exact fps is in its file; where the file has one value it is that."""
    names = ("id", "source_key", "bucket", "num_frames", "shape", "dtype", "file", "row")
    found = {name: row[name] for name in names}
    return {**found, "bytes": row["latent_length"], "fps": fps[0] if fps and fps[0] == fps[1] else fps}


def _state(versions: list[dict[str, Any]]) -> str:
    counting = [version for version in versions if version["counts"]]
    rows = sum(version["num_rows"] for version in counting)
    if rows and rows == sum(version["num_taken_down"] for version in counting):
        return "taken_down"
    if rows or any(version["same_as"] for version in counting):
        return "encoded"
    if any(version["num_rejects"] for version in counting):
        return "rejected"
    return "superseded" if any(version["num_rows"] for version in versions) else "rejected"

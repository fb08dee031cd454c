"""Takedowns: records that hide rows from every reader, in every snapshot and in receipts. Deletes nothing.

A record has the source of each sample and row that it names, so that a reader opens only the indexes of receipts with such a source. It is
created once. `lathe gc` may replace its names by hashes later, which hide the same rows. An object `{record}.undo.json` beside it, also
created once, says that it hides nothing any more.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ConfigError, InputError, OutputError
from pipeline.format.columns import storable
from pipeline.format.layout import TAKEDOWNS, takedown_key, undo_key, undone_record
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import RowSearch
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedown_record import Takedown, TakenRow, row_digest, sample_digest
from pipeline.records import split_id
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from pipeline.records import Receipt, SourceObject
    from pipeline.storage import Store

WORKERS = 16  # threads that read records from a remote store
REMEMBERED = 65536  # sources whose `uri_id` a filter keeps


class NamedRow(Protocol):
    """What a filter reads of a row, such as `IndexRow` or `FoundRow`. Texts as in rows."""

    @property
    def id(self) -> str:
        """Of the row."""

    @property
    def source_uri(self) -> str:
        """Of its source."""

    @property
    def source_key(self) -> str:
        """Of its sample."""


class Takedowns:
    """Filter of rows made of all takedowns of an output."""

    def __init__(self, records: Iterable[Takedown] = ()) -> None:
        self.records = tuple(sorted(records, key=lambda item: item.key))
        self._sources = {storable(uri) for item in self.records for uri in item.sources}
        self._samples = {(storable(uri), storable(key)) for item in self.records for uri, key in item.samples}
        # One variant of a clip shows what the others show.
        self._ids = {split_id(row.id)[0] for item in self.records for row in item.rows}
        self._keys_by_uri: dict[bytes, list[str]] = {}
        for item in self.records:
            for uri in item.uri_ids():
                self._keys_by_uri.setdefault(uri, []).append(item.key)
        names = [item.hashed for item in self.records]
        self._hashed_sources = {bytes.fromhex(uri) for one in names for uri in one.sources}
        self._hashed_samples = {digest for one in names for _, digest in one.samples}
        self._hashed_ids = {digest for one in names for _, digest in one.rows}
        self._hashed = bool(self._hashed_sources or self._hashed_samples or self._hashed_ids)
        self._uri_ids: dict[str, bytes] = {}  # of sources that were asked for: rows of one follow each other
        self.deleted = frozenset(key for item in self.records for key in item.deleted)
        """Keys of data files and indexes that were deleted because takedowns hide all their rows."""

    def __bool__(self) -> bool:
        return bool(self.records)

    def touches(self, receipt: Receipt) -> bool:
        """Whether rows of this receipt may be hidden; if not, its indexes need not be read."""
        return bool(self._keys_by_uri) and any(
            uri_id(source.uri) in self._keys_by_uri for source in receipt.shard.objects
        )

    def takes(self, uri: str) -> bool:
        """Whether a source is taken down as a whole: it is not encoded again."""
        if not self._sources and not self._hashed_sources:
            return False
        return storable(uri) in self._sources or (bool(self._hashed_sources) and uri_id(uri) in self._hashed_sources)

    def takes_any_of(self, source: SourceObject) -> bool:
        """Whether a source or one of its paired videos is taken down: it is not encoded again."""
        return self.takes(source.uri) or any(self.takes(member.uri) for member in source.members)

    def hides_all(self, receipt: Receipt) -> bool:
        """Whether every source of this receipt is taken down, so that no row of it is shown."""
        return all(self.takes(source.uri) for source in receipt.shard.objects)

    def keys_for(self, uris: Sequence[bytes]) -> list[str]:
        """Keys of the records that name one of these sources, given as `uri_id`s; sorted."""
        found = self._keys_by_uri
        return sorted({key for uri in uris for key in found.get(uri, ())}) if found else []

    def uri_ids(self) -> set[bytes]:
        """`uri_id` of every source that a record names."""
        return set(self._keys_by_uri)

    def hides(self, row: NamedRow) -> bool:
        """Whether this row is taken down: its source, its sample, it or another variant of its clip."""
        return (
            row.source_uri in self._sources
            or (row.source_uri, row.source_key) in self._samples
            or (bool(self._ids) and split_id(row.id)[0] in self._ids)
            or (self._hashed and self._hides_by_hash(row))
        )

    def _hides_by_hash(self, row: NamedRow) -> bool:
        source = self._uri_ids.get(row.source_uri)
        if source is None:
            if len(self._uri_ids) >= REMEMBERED:
                self._uri_ids.clear()
            source = self._uri_ids[row.source_uri] = uri_id(row.source_uri)
        if source not in self._keys_by_uri:
            return False
        return (
            source in self._hashed_sources
            or (bool(self._hashed_samples) and sample_digest(row.source_uri, row.source_key) in self._hashed_samples)
            or (bool(self._hashed_ids) and row_digest(row.id) in self._hashed_ids)
        )


NONE = Takedowns()


def read_takedowns(store: Store, *, known: Takedowns = NONE, without: Collection[str] = ()) -> Takedowns:
    """Every takedown of an output that was not undone: one LIST, and a read for each record. `known`: records that need not be read
    again, what they hide never changes. `without`: keys of records to leave out.

    Raises:
        OutputError: a record that cannot be read. Readers must stop: without it they would show rows that were taken down.
    """
    held = {item.key: item for item in known.records}
    listed, undone = listed_takedowns(store)
    wanted = [key for key in listed if key not in undone and key not in without]
    workers = WORKERS if is_remote(store.root) else 1
    return Takedowns(mapped_ahead(lambda key: held.get(key) or read_record(store, key), wanted, workers, "takedowns"))


def listed_takedowns(store: Store) -> tuple[list[str], set[str]]:
    """Keys of all records, in order of time, and of those among them that were undone."""
    listed, undone = [], set()
    for info in store.list(TAKEDOWNS):
        record = undone_record(info.key)
        if record is None:
            listed.append(info.key)
        elif info.size:  # an empty one, left by a kill on a mount without hard links, undoes nothing
            undone.add(record)
    return listed, undone


def read_record(store: Store, key: str) -> Takedown:
    """One record.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        if not key.endswith(".json"):
            raise ValueError("its name does not end in .json")
        return Takedown.from_json(key, store.read(key))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{key} cannot be read as a takedown: {error}; expected a record written by Lathe. Restore or remove it",
            uri=store.uri(key),
        ) from None


def may_be_deleted(store: Store, takedowns: Takedowns, shard_id: str, key: str) -> bool:
    """Whether a data file of a shard, or its index, may be deleted: takedowns hide all its rows, or every source of its receipt is taken
    down.
    """
    if not takedowns:
        return False
    if key in takedowns.deleted:
        return True
    try:
        receipt = Ledger(store).read(shard_id)
    except OutputError:
        return False
    return receipt is not None and takedowns.hides_all(receipt)


def record_takedown(
    store: Store,
    reason: str,
    *,
    sources: Sequence[str] = (),
    samples: Sequence[tuple[str, str]] = (),
    ids: Sequence[str] = (),
    rows: Sequence[TakenRow] = (),
    by: str = "",
    deleted: Sequence[str] = (),
) -> Takedown:
    """Writes one takedown. From then on no reader shows these rows; files keep their bytes until they are rewritten.

    Args:
        store: the output.
        reason: why, for later readers.
        sources: URIs as spelled in receipts; need not be in the output yet.
        samples: (URI, key) of samples.
        ids: ids of rows that are in the output. They are looked for in the indexes of files whose ids lie around them.
        rows: rows with their sources, which are not looked for.
        by: who asked for it.
        deleted: data files and indexes that were deleted because takedowns hide all their rows.

    Raises:
        ConfigError: nothing is named.
        InputError: an id that no row has, of those whose indexes can be read.
    """
    if not sources and not samples and not ids and not rows:
        raise ConfigError("a takedown names nothing; expected sources, samples or ids of rows")
    Ledger(store).latent_set()
    found = (*rows, *_find_rows(store, ids)) if ids else tuple(rows)
    now = datetime.now(UTC)
    key = takedown_key(f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}")
    made = Takedown(key, _iso(now), reason, tuple(sources), tuple(samples), found, by, deleted=tuple(deleted))
    if not store.put_if_absent(key, made.to_json()):
        raise OutputError(f"{key} exists already; run again", uri=store.uri(key))
    return made


def record_undo(store: Store, key: str, reason: str, by: str) -> bool:
    """Writes that the record `key` hides nothing any more. False if it was undone before."""
    made = {"format_version": 2, "undoes": key, "created": _iso(datetime.now(UTC)), "reason": reason, "by": by}
    return store.put_if_absent(undo_key(key), json.dumps(made, indent=1).encode())


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="microseconds")


def _find_rows(store: Store, ids: Sequence[str]) -> tuple[TakenRow, ...]:
    search = RowSearch(store)
    found = {row.id: TakenRow(row.id, row.source_uri) for row in search.rows(ids)}
    if missing := sorted(set(ids) - set(found)):
        why = (
            f"; {len(search.unread)} indexes or snapshots cannot be read, such as {search.unread[0]}"
            if search.unread
            else ""
        )
        raise InputError(f"{len(missing)} of {len(set(ids))} ids are not in {store.root}, such as {missing[0]!r}{why}")
    return tuple(found[name] for name in sorted(found))

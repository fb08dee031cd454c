"""Takedowns: records that hide rows from every reader, in every snapshot and in receipts. Create-only; deletes nothing.

A record names sources (all versions and clips of a URI), samples (a key of a source), or single rows by id. It has the source of each
row, so that a reader opens only the indexes of receipts with such a source.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InputError, NotFound, OutputError
from pipeline.format.columns import storable
from pipeline.format.layout import TAKEDOWNS, takedown_key
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.summary import uri_id
from pipeline.records import split_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from pipeline.format.index import IndexRow
    from pipeline.records import Receipt
    from pipeline.storage import Store

FORMAT_VERSION = 1
ROW = {"id", "source_uri"}


@dataclass(frozen=True, slots=True)
class TakenRow:
    """One row by its id, and its source as spelled in rows."""

    id: str
    source_uri: str


@dataclass(frozen=True, slots=True)
class Takedown:
    """One record. `sources` and `samples` as spelled in receipts."""

    key: str
    created: str  # UTC, ISO 8601
    reason: str
    sources: tuple[str, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()  # (uri, key)
    rows: tuple[TakenRow, ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON bytes, without the key."""
        values = {name: value for name, value in asdict(self).items() if name != "key"}
        return json.dumps({"format_version": FORMAT_VERSION, **values}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, key: str, data: bytes) -> Takedown:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: not a takedown, or one of another format version.
        """
        raw: Any = json.loads(data)
        if not isinstance(raw, dict) or not all(
            isinstance(raw.get(name), list) for name in ("sources", "samples", "rows")
        ):
            raise ValueError("expected a JSON object with the lists sources, samples and rows")
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {raw['format_version']!r}, this Lathe reads {FORMAT_VERSION}")
        samples, rows = raw["samples"], raw["rows"]
        if not _are_texts([raw["created"], raw["reason"], *raw["sources"]]):
            raise ValueError("created, reason and sources have to be strings")
        if not all(isinstance(item, list) and len(item) == 2 and _are_texts(item) for item in samples):
            raise ValueError("samples have to be pairs of strings, the URI of the source and the key")
        if not all(isinstance(row, dict) and set(row) == ROW and _are_texts(row.values()) for row in rows):
            raise ValueError("rows have to be objects with the strings id and source_uri")
        pairs = tuple((uri, name) for uri, name in samples)
        found = tuple(TakenRow(**row) for row in rows)
        return cls(key, raw["created"], raw["reason"], tuple(raw["sources"]), pairs, found)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


class Takedowns:
    """Filter of rows made of all takedowns of an output."""

    def __init__(self, records: Iterable[Takedown] = ()) -> None:
        self.records = tuple(sorted(records, key=lambda item: item.key))
        self._sources = {storable(uri) for item in self.records for uri in item.sources}
        self._samples = {(storable(uri), storable(key)) for item in self.records for uri, key in item.samples}
        # One variant of a clip shows what the others show.
        self._ids = {split_id(row.id)[0] for item in self.records for row in item.rows}
        self._uris = self._sources | {uri for uri, _ in self._samples}
        self._uris |= {row.source_uri for item in self.records for row in item.rows}
        self._keys_by_uri: dict[bytes, list[str]] = {}
        for item in self.records:
            named = {*item.sources, *(uri for uri, _ in item.samples), *(row.source_uri for row in item.rows)}
            for uri in named:
                self._keys_by_uri.setdefault(uri_id(uri), []).append(item.key)

    def __bool__(self) -> bool:
        return bool(self.records)

    def touches(self, receipt: Receipt) -> bool:
        """Whether rows of this receipt may be hidden; if not, its indexes need not be read."""
        return bool(self._uris) and any(storable(source.uri) in self._uris for source in receipt.shard.objects)

    def hides_all(self, receipt: Receipt) -> bool:
        """Whether every source of this receipt is taken down, so that no row of it is shown."""
        return bool(self._sources) and all(storable(source.uri) in self._sources for source in receipt.shard.objects)

    def keys_for(self, uris: Sequence[bytes]) -> list[str]:
        """Keys of the records that name one of these sources, given as `uri_id`s; sorted."""
        found = self._keys_by_uri
        return sorted({key for uri in uris for key in found.get(uri, ())}) if found else []

    def uri_ids(self) -> set[bytes]:
        """`uri_id` of every source that a record names."""
        return set(self._keys_by_uri)

    def hides(self, row: IndexRow) -> bool:
        """Whether this row is taken down: its source, its sample, it or another variant of its clip."""
        return (
            row.source_uri in self._sources
            or (row.source_uri, row.source_key) in self._samples
            or (bool(self._ids) and split_id(row.id)[0] in self._ids)
        )


NONE = Takedowns()


def read_takedowns(store: Store, *, known: Takedowns = NONE, without: Collection[str] = ()) -> Takedowns:
    """Every takedown of an output: one LIST, and a read for each record. `known`: records that need not be read again, they never
    change. `without`: keys of records to leave out.

    Raises:
        OutputError: a record that cannot be read. Readers must stop: without it they would show rows that were taken down.
    """
    found = []
    held = {item.key: item for item in known.records}
    for info in store.list(TAKEDOWNS):
        if info.key in without:
            continue
        try:
            if not info.key.endswith(".json"):
                raise ValueError("its name does not end in .json")
            found.append(held.get(info.key) or Takedown.from_json(info.key, store.read(info.key)))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{info.key} cannot be read as a takedown: {error}; expected a record written by Lathe. Restore or remove it",
                uri=store.uri(info.key),
            ) from None
    return Takedowns(found)


def may_be_deleted(store: Store, takedowns: Takedowns, shard_id: str) -> bool:
    """Whether the files of a shard may be deleted: its receipt can be read, and every source of it is taken down."""
    try:
        receipt = Ledger(store).read(shard_id) if takedowns else None
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
) -> Takedown:
    """Writes one takedown. From then on no reader shows these rows; files keep their bytes until they are rewritten.

    Args:
        store: the output.
        reason: why, for later readers.
        sources: URIs as spelled in receipts; need not be in the output yet.
        samples: (URI, key) of samples.
        ids: ids of rows that are in the output. Finding them reads every index.

    Raises:
        ConfigError: nothing is named.
        InputError: an id that no row has, of those whose indexes can be read.
    """
    if not sources and not samples and not ids:
        raise ConfigError("a takedown names nothing; expected sources, samples or ids of rows")
    Ledger(store).latent_set()
    now = datetime.now(UTC)
    key = takedown_key(f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}")
    rows = _find_rows(store, ids) if ids else ()
    made = Takedown(key, now.isoformat(timespec="microseconds"), reason, tuple(sources), tuple(samples), rows)
    if not store.put_if_absent(key, made.to_json()):
        raise OutputError(f"{key} exists already; run again", uri=store.uri(key))
    return made


def _find_rows(store: Store, ids: Sequence[str]) -> tuple[TakenRow, ...]:
    wanted, found, unread = set(ids), {}, []
    for receipt in Ledger(store).all():
        for item in receipt.files:
            try:
                rows = stored_index(store, item.index_key)
            except (NotFound, OutputError):  # files that were taken down earlier may be deleted
                unread.append(item.index_key)
                continue
            found.update({row.id: TakenRow(row.id, row.source_uri) for row in rows if row.id in wanted})
    if missing := sorted(wanted - set(found)):
        why = f"; {len(unread)} indexes cannot be read, such as {unread[0]}" if unread else ""
        raise InputError(f"{len(missing)} of {len(wanted)} ids are not in {store.root}, such as {missing[0]!r}{why}")
    return tuple(found[name] for name in sorted(found))

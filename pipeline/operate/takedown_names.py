"""What names of a takedown stand for in an output and in its takedowns: sources, samples, or rows.

A name is, in this order: the URI of a source (also a local path), or of a plain file that is a member of one, `URI#KEY` for a sample of
it, the id of a row, the key of a sample.
`resolve` takes the store and names as users write them, returns `Named`. Sources are looked for in the summaries of receipts, so that no
receipt is read; ids and keys in the indexes of files in which they can lie. `TakenNames` looks into records, also for names that
`lathe gc` replaced by hashes.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.format.columns import ID_PATTERN, storable
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import FoundRow, RowSearch
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.ledger.summary_tables import rows_naming
from pipeline.ledger.takedown_record import TakenRow, row_digest, sample_digest
from pipeline.operate.member_search import mains_of
from pipeline.process.scratch import ScratchFolder
from pipeline.storage import is_remote, locate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from pipeline.ledger.takedown_record import Takedown
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.storage import Store

NEAR = 3  # names like one that is unknown
SHOWN = 5  # unknown names, URIs of one key
READ_FOR_NEAR = 256  # receipts and indexes, each


@dataclass(slots=True)
class Named:
    """What names stand for. `unknown`: names that the output does not have. `taken`: of these, those that earlier takedowns hold.
    `skipped`: comments of lists that are no names.
    """

    sources: list[str] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    rows: list[TakenRow] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources) + len(self.samples) + len(self.rows)


def resolve(
    store: Store,
    names: Sequence[str],
    earlier: Takedowns,
    *,
    allow_unknown: bool = False,
    comments: Collection[str] = (),
) -> Named:
    """What `names` stand for.

    Args:
        store: the output.
        names: as users write them.
        earlier: takedowns of the output. Their names are known although the files may be gone.
        allow_unknown: names that the output does not have are sources.
        comments: of `names`, those that are skipped if they stand for nothing.

    Raises:
        InputError: unknown names, with those that are like them; the key of samples of several sources; nothing but skipped comments.
        OutputError: a receipt of another format version.
    """
    search = RowSearch(store)
    found, left = Named(), []
    uris = _Uris(store)
    for name in dict.fromkeys(names):
        if (uri := uris.known(name)) is not None:
            found.sources.append(uri)
        else:
            left.append(name)
    # The file as well: a job without `members` would encode it as a video of its own.
    for member, mains in mains_of(store, {*names, *map(spelled, names)}).items():
        found.sources += [member, *mains]
        left = [name for name in left if member not in (name, spelled(name))]
    left = _samples_of_sources(search, uris, left, found)
    ids = [name for name in left if ID_PATTERN.fullmatch(name)]
    rows = {row.id: TakenRow(row.id, row.source_uri) for row in search.rows(ids)} if ids else {}
    found.rows = list(rows.values())
    left = [name for name in left if name not in rows]
    left = _samples_by_key(store, search, left, found)
    taken_names = TakenNames(store, earlier.records)
    taken = {name for name in left if earlier.takes(spelled(name)) or taken_names.meant(name)}
    found.taken, left = [name for name in left if name in taken], [name for name in left if name not in taken]
    found.skipped, left = [name for name in left if name in comments], [name for name in left if name not in comments]
    if left and not allow_unknown:
        raise _unknown(store, search, left)
    if found.skipped and len(found.skipped) == len(set(names)):
        raise InputError(
            f"all {len(found.skipped)} lines that were given begin with # and name nothing in {store.root}, expected one name per line; "
            "nothing was recorded"
        )
    found.sources = list(
        dict.fromkeys([*found.sources, *map(spelled, left)])
    )  # one path may be spelled in several ways
    found.samples = list(dict.fromkeys(found.samples))
    found.unknown = left
    return found


def spelled(name: str) -> str:
    """A URI as receipts spell it: local ones are absolute paths."""
    try:
        return name if is_remote(name) else os.path.join(*locate(name))
    except InputError:  # a scheme that no input has
        return name


def pairs(name: str) -> list[tuple[str, str]]:
    """Readings of `URI#KEY`; both parts may hold `#`."""
    return [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "#" and 0 < at < len(name) - 1]


class TakenNames:
    """Samples and rows that takedowns name, also by hashes, by the names that users write."""

    def __init__(self, store: Store, records: Sequence[Takedown]) -> None:
        self._store = store
        self._samples = {(storable(uri), storable(key)) for record in records for uri, key in record.samples}
        self._by_key: dict[str, list[str]] = {}
        for uri, key in sorted(self._samples):
            self._by_key.setdefault(key, []).append(uri)
        self._rows = {row.id: storable(row.source_uri) for record in records for row in record.rows}
        hashed = [record.hashed for record in records]
        self._hashed_samples = {digest: source for one in hashed for source, digest in one.samples}
        self._hashed_rows = {digest: source for one in hashed for source, digest in one.rows}

    def meant(self, name: str) -> list[FoundRow]:
        """Samples (with an empty id) whose key or `URI#KEY` the name is, and rows (with an empty key) whose id it is. Texts as in rows.

        Of names that were replaced by hashes the source is known from `URI#KEY`, or if a receipt names it.
        """
        key = storable(name)
        samples = [(uri, key) for uri in self._by_key.get(key, ())]
        for start, end in pairs(name):
            for pair in {(storable(start), storable(end)), (storable(spelled(start)), storable(end))}:
                if pair in self._samples or (self._hashed_samples and sample_digest(*pair) in self._hashed_samples):
                    samples.append(pair)
        if self._hashed_samples and not is_remote(name):
            samples += [(uri, key) for uri in self._uris.values() if sample_digest(uri, key) in self._hashed_samples]
        rows = [(name, self._rows[name])] if name in self._rows else []
        source = self._hashed_rows.get(row_digest(key)) if self._hashed_rows else None
        if source is not None and source in self._uris:
            rows.append((name, self._uris[source]))
        found = [*(FoundRow("", *pair) for pair in samples), *(FoundRow(*row, "") for row in rows)]
        return list(dict.fromkeys(found))

    @cached_property
    def _uris(self) -> dict[str, str]:
        """URIs, as in rows, of sources of hashed samples and rows that a receipt names, by `uri_id` in hex."""
        wanted = {bytes.fromhex(source) for source in (*self._hashed_samples.values(), *self._hashed_rows.values())}
        with ScratchFolder() as folder:
            table = read_table(Summaries(self._store).spool(folder / "summaries"), ["key", "uris"])
        keys = table.take(rows_naming(table, wanted))["key"].to_pylist()
        receipts = Ledger(self._store).read_all([key] for key in keys)
        uris = (source.uri for receipt in receipts if receipt is not None for source in receipt.shard.objects)
        return {uri_id(uri).hex(): storable(uri) for uri in uris if uri_id(uri) in wanted}


class _Uris:
    """URIs that receipts name, as hashes: 8 bytes each."""

    def __init__(self, store: Store) -> None:
        with ScratchFolder() as folder:
            path = Summaries(store).spool(folder / "summaries")
            names = read_table(path, ["uris"])["uris"]
            self._sorted = np.unique(np.frombuffer(b"".join(names.to_pylist()), "<u8"))

    def known(self, name: str) -> str | None:
        """The URI as receipts spell it; None if no receipt names it."""
        return next((uri for uri in (name, spelled(name)) if self._holds(uri)), None)

    def _holds(self, uri: str) -> bool:
        (wanted,) = np.frombuffer(uri_id(uri), "<u8")
        place = int(np.searchsorted(self._sorted, wanted))
        return place < len(self._sorted) and self._sorted[place] == wanted


def _samples_of_sources(search: RowSearch, uris: _Uris, names: Iterable[str], found: Named) -> list[str]:
    """Takes names `URI#KEY` of known sources. Returns the others. Both parts may hold `#`."""
    left, asked = [], {}
    for name in names:
        known = [(uri, key) for start, key in pairs(name) if (uri := uris.known(start)) is not None]
        if known:
            asked[name] = known
        else:
            left.append(name)
    stored = search.samples({key for known in asked.values() for _, key in known}) if asked else set()
    for name, known in asked.items():
        mine = [pair for pair in ((storable(uri), storable(key)) for uri, key in known) if pair in stored]
        if mine:
            found.samples.append(mine[0])
        else:
            left.append(name)
    return left


def _samples_by_key(store: Store, search: RowSearch, names: list[str], found: Named) -> list[str]:
    """Takes names that are the key of one sample. Returns the others.

    Raises:
        InputError: a key of samples of several sources.
    """
    by_key: dict[str, list[str]] = {}
    for uri, key in sorted(search.samples(names)) if names else ():
        by_key.setdefault(key, []).append(uri)
    for key, uris in by_key.items():
        if len(uris) > 1:
            more = f" and {len(uris) - SHOWN} more" if len(uris) > SHOWN else ""
            raise InputError(
                f"{len(uris)} sources of {store.root} have a sample {key!r}: {', '.join(uris[:SHOWN])}{more}; nothing was recorded. "
                f"Name one as {uris[0]}#{key}, or the source itself"
            )
        found.samples.append((uris[0], key))
    return [name for name in names if storable(name) not in by_key]


def _unknown(store: Store, search: RowSearch, names: list[str]) -> InputError:
    there = names_there(store, search)
    parts = []
    for name in names[:SHOWN]:
        near = difflib.get_close_matches(name, there, NEAR)
        parts.append(f"{name!r}" + (f" (there is {', '.join(near)})" if near else ""))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    unread = f"; {len(search.unread)} indexes or snapshots could not be read" if search.unread else ""
    return InputError(
        f"{store.root} has no source, sample or row {', '.join(parts)}{more}; nothing was recorded{unread}. Take a name that is there, "
        "or --allow-unknown for sources that are not encoded yet"
    )


def names_there(store: Store, search: RowSearch) -> list[str]:
    """URIs, keys and ids of a part of the output, evenly spread."""
    ledger = Ledger(store)
    keys = list(ledger.keys_by_shard().values())
    chosen = (
        keys if len(keys) <= READ_FOR_NEAR else [keys[i * len(keys) // READ_FOR_NEAR] for i in range(READ_FOR_NEAR)]
    )
    receipts = [receipt for receipt in ledger.read_all(chosen) if receipt is not None]
    uris = [source.uri for receipt in receipts for source in receipt.shard.objects]
    rows = list(search.near(READ_FOR_NEAR))
    return list(dict.fromkeys([*uris, *(row.source_key for row in rows), *(row.id for row in rows)]))

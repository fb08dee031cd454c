"""What names of a takedown stand for in an output: sources, samples, or rows.

A name is, in this order: the URI of a source (also a local path), `URI#KEY` for a sample of it, the id of a row, the key of a sample.
Takes the store and names as users write them, returns `Named`. Sources are looked for in the summaries of receipts, so that no receipt is
read; ids and keys in the indexes of files in which they can lie.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.format.columns import ID_PATTERN, storable
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import RowSearch
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedown_record import TakenRow
from pipeline.process.scratch import ScratchFolder
from pipeline.storage import is_remote, locate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.storage import Store

NEAR = 3  # names like one that is unknown
SHOWN = 5  # unknown names, URIs of one key
READ_FOR_NEAR = 256  # receipts and indexes, each


@dataclass(slots=True)
class Named:
    """What names stand for. `unknown`: names that the output does not have."""

    sources: list[str] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    rows: list[TakenRow] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources) + len(self.samples) + len(self.rows)


def resolve(store: Store, names: Sequence[str], *, allow_unknown: bool = False) -> Named:
    """What `names` stand for. `allow_unknown`: names that the output does not have are sources.

    Raises:
        InputError: unknown names, with those that are like them; the key of samples of several sources.
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
    left = _samples_of_sources(search, uris, left, found)
    ids = [name for name in left if ID_PATTERN.fullmatch(name)]
    rows = {row.id: TakenRow(row.id, row.source_uri) for row in search.rows(ids)} if ids else {}
    found.rows = list(rows.values())
    left = [name for name in left if name not in rows]
    left = _samples_by_key(store, search, left, found)
    if left and not allow_unknown:
        raise _unknown(store, search, left)
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
        parts = [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "#"]
        pairs = [(uri, key) for start, key in parts if key and (uri := uris.known(start)) is not None]
        if pairs:
            asked[name] = pairs
        else:
            left.append(name)
    stored = search.samples({key for pairs in asked.values() for _, key in pairs}) if asked else set()
    for name, pairs in asked.items():
        mine = [pair for pair in ((storable(uri), storable(key)) for uri, key in pairs) if pair in stored]
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

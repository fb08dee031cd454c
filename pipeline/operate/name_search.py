"""Which receipts of an output name an input, and which inputs have a sample or row of a name, for `lathe why`.

A name is, in this order: the URI of an input (also a local path), `URI#KEY` for a sample of it, the id of a row, the key of a sample. URIs
are found by their hashes in the summaries of receipts, ids and keys by `ledger.row_search`; receipts are read only for rejects.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from pipeline.format.columns import ID_PATTERN, storable
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import RowSearch
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.ledger.summary_tables import read_summaries, rows_naming
from pipeline.operate.takedown_names import TakenNames, names_there, pairs, spelled
from pipeline.process.scratch import ScratchFolder
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import Receipt
    from pipeline.storage import Store

NEAR = 5


class NameSearch:
    """Searches one output for one name. A context manager, because the summaries lie in a temporary file.

    Raises:
        OutputError: a receipt or a table that cannot be read.
    """

    def __init__(self, store: Store, name: str, takedowns: Takedowns) -> None:
        self._taken = TakenNames(store, takedowns.records)
        self._store, self._ledger, self.name = store, Ledger(store), name
        self._workers = 16 if is_remote(store.root) else 1
        self._folder = ScratchFolder()
        self._keys = {name, *(key for _, key in pairs(name))}  # that the name may stand for
        self._rejected: set[tuple[str, str]] = (
            set()
        )  # (URI, key) of rejects with these keys in receipts that are not cached
        self._read: set[str] = set()  # shards of these receipts
        summaries = Summaries(store, self._workers)
        self._path = summaries.spool(Path(self._folder.path) / "receipts.parquet", self._look_at)
        self._table = read_table(self._path, ["key", "shard_id", "uris", "reasons"])
        self._rows = RowSearch(store)

    def __enter__(self) -> NameSearch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.close()

    def naming(self, uris: Iterable[str]) -> list[ReceiptSummary]:
        """Summaries of all receipts that name one of these URIs."""
        return read_summaries(self._path, rows_naming(self._table, {*map(uri_id, uris)}))

    def row(self) -> tuple[str, str | None] | None:
        """URI and key of the row whose id is the name; no key if it was taken down and its file is gone."""
        if not ID_PATTERN.fullmatch(self.name):
            return None
        if found := self._rows.rows([self.name]):
            return found[0].source_uri, found[0].source_key
        return next(((row.source_uri, None) for row in self._taken.meant(self.name) if row.id), None)

    def samples(self) -> list[tuple[str, str]]:
        """(URI, key) of samples whose key the name is, or whose URI and key as `URI#KEY`.

        Those with rows, else rejected ones, else those that takedowns name and whose files are gone.
        """
        return (
            self._meant(self._rows.samples(self._keys))
            or self._meant(self._rejected | self._cached_rejects())
            or self._meant((storable(uri), storable(key)) for row, uri, key in self._taken.meant(self.name) if not row)
        )

    def near(self) -> list[str]:
        """Names of the output that are like this one."""
        there = names_there(self._store, self._rows)
        # The digest of an id is like no other, and leaves its beginning.
        return difflib.get_close_matches(self.name, there, NEAR) or difflib.get_close_matches(
            self.name, there, NEAR, 0.4
        )

    def _meant(self, found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        whole = {(storable(spelled(uri)), storable(key)) for uri, key in pairs(self.name)}
        return sorted(pair for pair in found if pair[1] == storable(self.name) or pair in whole)

    def _look_at(self, receipt: Receipt) -> None:
        self._read.add(receipt.shard_id)
        self._rejected |= self._rejects_of(receipt)

    def _rejects_of(self, receipt: Receipt) -> set[tuple[str, str]]:
        return {(storable(str(item.uri)), storable(item.key)) for item in receipt.rejects if item.key in self._keys}

    def _cached_rejects(self) -> set[tuple[str, str]]:
        """Of receipts that have rejects and were not read yet: each is read now."""
        some = self._table.filter(pc.not_equal(self._table["reasons"], "{}"))
        named = zip(some["key"].to_pylist(), some["shard_id"].to_pylist(), strict=True)
        found: set[tuple[str, str]] = set()
        for receipt in self._receipts([key for key, shard in named if shard not in self._read]):
            found |= self._rejects_of(receipt)
        return found

    def _receipts(self, keys: list[str]) -> Iterator[Receipt]:
        found = self._ledger.read_all(([key] for key in keys), self._workers)
        return (receipt for receipt in found if receipt is not None)

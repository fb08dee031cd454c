"""Data files of a dataset, with the positions in each of rows that do not count: from a snapshot's manifest, or from receipts.

A dataset has one fingerprint. Files are numbered in the order of the manifest, which never changes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.ledger.copies import NO_COPIES, CompactedFiles
from pipeline.ledger.counted import counted_receipts, shares
from pipeline.ledger.manifest import FILES, file_row
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots, published_copies

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.storage import Store

COLUMNS = [
    "key",
    "index_key",
    "bucket",
    "bytes",
    "index_sha256",
    "fingerprint",
    "shard_id",
    "file_rows",
    "ranges",
    "hidden",
]


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Columns of the manifest. `identity` tells this list of rows from every other; `applied`: keys of takedowns that it has subtracted.

    `hidden`: by file number, positions of rows that do not count. `copies_of`: the snapshot whose compactions made some of the files; None
    if nothing was published.
    """

    table: pa.Table = field(repr=False)
    identity: str
    applied: frozenset[str]
    hidden: dict[int, np.ndarray] = field(repr=False)
    copies_of: int | None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def value(self, column: str, number: int) -> Any:
        """One value of one file."""
        return self.table[column][number].as_py()

    def buckets(self) -> dict[str, np.ndarray]:
        """Numbers of the files of each bucket, int32, ascending; by the name of their folder."""
        codes = self.table["bucket"].combine_chunks().dictionary_encode()
        if isinstance(codes, pa.ChunkedArray):
            codes = codes.combine_chunks()
        numbers = codes.indices.to_numpy()
        return {
            name: np.flatnonzero(numbers == code).astype(np.int32)
            for code, name in enumerate(codes.dictionary.to_pylist())
        }

    def rows(self) -> np.ndarray:
        """Rows in each file, counted or not, int64."""
        return self.table["file_rows"].to_numpy()

    def counts(self) -> np.ndarray:
        """Rows in each file that count, int64."""
        counts = self.rows().copy()
        for number, gone in self.hidden.items():
            counts[number] -= len(gone)
        return counts

    def positions(self, number: int) -> np.ndarray | None:
        """Positions of rows that count, int32; None if all do."""
        gone = self.hidden.get(number)
        if gone is None:
            return None
        kept = np.ones(self.value("file_rows", number), bool)
        kept[gone] = False
        return np.flatnonzero(kept).astype(np.int32)


def published_files(store: Store, number: int | None, fingerprint: str | None) -> tuple[DataFiles, int]:
    """Files of a snapshot (the newest if `number` is None), and its number.

    Raises:
        InputError: nothing is published, no such snapshot; several fingerprints and none is chosen, or none begins with `fingerprint`.
        OutputError: not a latent set, or a manifest that cannot be read.
    """
    latent_set = Ledger(store).latent_set()
    snapshots = Snapshots(store)
    snapshot = snapshots.get(number)
    table = snapshots.table(snapshot, "files", COLUMNS)
    table, chosen = _of_fingerprint(table, fingerprint, f"{store.root}@{snapshot.number}")
    reference = snapshot.tables.get("files")
    identity = f"{latent_set.name}@{snapshot.number}:{chosen[:8]}:{reference.sha256[:16] if reference else 'empty'}"
    files = DataFiles(table, identity, frozenset(snapshot.takedowns), _hidden(table), snapshot.number)
    return files, snapshot.number


def received_files(store: Store, fingerprint: str | None) -> DataFiles:
    """Files that receipts name at present, also of a build that still runs. Raises as `published_files`."""
    latent_set = Ledger(store).latent_set()
    applied: set[str] = set()
    newest = max(Snapshots(store).numbers(), default=None)
    copies = NO_COPIES if newest is None else published_copies(store, newest)
    compacted = CompactedFiles(store, copies)

    def rows() -> Iterable[dict[str, Any]]:
        for part in counted_receipts(store, copies=copies):
            applied.update(item.key for item in part.takedowns.records)
            for share in shares(store, part)[1]:
                if share.copy is not None:
                    compacted.show(share.copy, share.hidden)
                elif share.rows:
                    yield file_row(part, share)

    table = pa.Table.from_pylist(list(rows()), FILES)
    table = pa.concat_tables([table, compacted.table()]).sort_by("key").select(COLUMNS)
    table, chosen = _of_fingerprint(table, fingerprint, store.root)
    digest = hashlib.blake2b(digest_size=8)
    for batch in table.select(["key", "hidden"]).to_batches():
        digest.update(repr(batch.to_pydict()).encode())
    identity = f"{latent_set.name}:receipts:{chosen[:8]}:{digest.hexdigest()}"
    return DataFiles(table, identity, frozenset(applied), _hidden(table), newest)


def _of_fingerprint(table: pa.Table, wanted: str | None, where: str) -> tuple[pa.Table, str]:
    found = sorted(pc.unique(table["fingerprint"]).to_pylist())
    matching = [name for name in found if name.startswith(wanted or "")]
    if not found and wanted is None:
        return table, ""
    if len(matching) != 1:
        shown = ", ".join(name[:8] for name in found) or "none"
        raise InputError(
            f"{where} holds the fingerprints {shown}, "
            + (
                "a dataset has one; choose it by fingerprint= (of a command: --fingerprint)"
                if wanted is None
                else f"expected one that begins with {wanted!r}"
            )
        )
    return table if len(found) == 1 else table.filter(pc.equal(table["fingerprint"], matching[0])), matching[0]


def _hidden(table: pa.Table) -> dict[int, np.ndarray]:
    numbers = np.flatnonzero(pc.list_value_length(table["hidden"]).to_numpy())
    return {
        int(number): np.array(positions, np.int32)
        for number, positions in zip(numbers, table["hidden"].take(pa.array(numbers)).to_pylist(), strict=True)
    }

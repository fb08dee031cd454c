"""What the newest snapshot of an output and its readers must show: the rows of a clean run."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.format.index import read_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.loader import LatentDataset
from pipeline.operate.verify import verify_output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.storage import Store
    from tests.chaos.corpus import Rows, UploadedCorpus


def plain(rows: Rows) -> dict[str, tuple[Any, ...]]:
    """Rows to compare: all columns, latents as their hash."""
    found = {}
    for name, row in rows.items():
        digest = hashlib.sha256(row["vae_latent_bytes"]).hexdigest()
        found[name] = (*((key, value) for key, value in sorted(row.items()) if key != "vae_latent_bytes"), digest)
    return found


def published(store: Store) -> Rows:
    """Rows of the newest snapshot by its tables, indexes and data files. An id that occurs twice fails."""
    snapshots, takedowns = Snapshots(store), read_takedowns(store)
    found: Rows = {}
    for file in snapshots.table(snapshots.latest(), "files").to_pylist():
        index = read_index(store.read(file["index_key"]))[0]
        stored = pq.read_table(io.BytesIO(store.read(file["key"]))).to_pylist()
        for entry in index:
            if entry.row not in file["hidden"] and not takedowns.hides(entry):
                assert entry.id not in found, f"row {entry.id} is there twice"
                found[entry.id] = stored[entry.row]
    return found


def assert_published(store: Store, expected: Rows) -> None:
    """The newest snapshot has these rows and no others, all columns and tensors."""
    rows, wanted = plain(published(store)), plain(expected)
    assert rows == wanted, f"published {_difference(rows, wanted)}"


def assert_readers_see(corpus: UploadedCorpus, output: str, expected: Rows) -> None:
    """The loader shows these rows and no others; `verify` finds that each has its recorded hash and the Delta view is right."""
    store = corpus.store(output)
    dataset = LatentDataset.open(output, storage=corpus.server.config())
    try:
        seen = [row.id for row in dataset.rows()]
    finally:
        dataset.close()
    assert sorted(seen) == sorted(expected), f"loaded {_difference(Counter(seen), Counter(list(expected)))}"
    newest = Snapshots(store).latest().number
    for report in (verify_output(store), verify_output(store, snapshot=newest)):
        assert report.problems == []


def _difference(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"too many: {sorted(found.keys() - wanted.keys())}, lost: {sorted(wanted.keys() - found.keys())}, other: {other}"


def stored_files(store: Store) -> set[str]:
    """Keys of data files and indexes."""
    return {key for prefix in ("data/", "_index/") for key in store.keys(prefix) if "_delta_log" not in key}


def named_files(store: Store) -> set[str]:
    """Keys of data files and indexes that the newest snapshot names."""
    snapshots = Snapshots(store)
    table = snapshots.table(snapshots.latest(), "files", ["key", "index_key"]).to_pydict()
    return {*table["key"], *table["index_key"]}

"""Data files that `.huggingface.yaml` names: a glob, or after a compaction a list without the files that were compacted.

`datasets.load_dataset(root)` takes every file that a glob finds. Between a compaction and `lathe gc`, that would be each row twice.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.format.card import hugging_face_config
from pipeline.format.layout import COMPACTED, DATA, HUGGING_FACE_KEY
from pipeline.ledger.copies import Copies
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots

if TYPE_CHECKING:
    from pipeline.storage import Store


def data_files(store: Store, fingerprint: str, container: str) -> list[str] | None:
    """Keys of the data files of one configuration that a reader without Lathe should take; None: all, nothing was compacted.

    Raises:
        OutputError: the newest snapshot cannot be read.
    """
    snapshots = Snapshots(store)
    newest = snapshots.latest()
    if newest is None or "copies" not in newest.tables:
        return None
    copied = set(Copies(snapshots.table(newest, "copies")).table["origin"].to_pylist())
    published = set(snapshots.table(newest, "files", ["key"])["key"].to_pylist())
    found = (key for key in store.keys(f"{DATA}{fingerprint[:8]}/") if key.endswith(f".{container}"))
    return [key for key in found if key in published or not (key in copied or f"-{COMPACTED}" in key)]


def name_data_files(store: Store) -> None:
    """Writes `.huggingface.yaml` for what the newest snapshot holds, unless the user keeps an own one. Outputs of version 1 have none."""
    newest = Snapshots(store).latest()
    if newest is None or Ledger(store).layout.version < 2:
        return
    config = store.read(HUGGING_FACE_KEY).decode("utf-8", "replace") if store.exists(HUGGING_FACE_KEY) else None
    state = f"data files of {datetime.now(UTC).isoformat()}"
    keys = Snapshots(store).table(newest, "files", ["key", "fingerprint"]).to_pydict()
    kinds = {(name, key.rpartition(".")[2]) for key, name in zip(*keys.values(), strict=True)}
    for fingerprint, container in sorted(kinds):
        files = data_files(store, fingerprint, container)
        changed = hugging_face_config(config, fingerprint, container, state, files)
        if changed is None:
            return
        config = changed
    if config is not None:
        store.write(HUGGING_FACE_KEY, config.encode())

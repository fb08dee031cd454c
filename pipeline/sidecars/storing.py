"""Storing of one unit of work: rows into a local file, its upload, its receipt. The attempt that is second deletes what it uploaded."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import DrillConfig
from pipeline.errors import BuildError
from pipeline.process import kill_points as drill
from pipeline.process.scratch import local_disk
from pipeline.sidecars.description import create_set
from pipeline.sidecars.files import SidecarFileWriter, tensor_payload
from pipeline.sidecars.names import data_key, index_key
from pipeline.sidecars.receipts import SidecarReceipt, SidecarReceipts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

    from pipeline.sidecars.description import SidecarSet
    from pipeline.storage import Store


def store_unit(
    store: Store,
    described: SidecarSet,
    unit: str,
    attempt: str,
    rows: Iterable[tuple[bytes, str, Mapping[str, np.ndarray]]],
    folder: str | Path,
    *,
    counts: dict[str, int] | None = None,
    notes: dict[str, Any] | None = None,
    failures: DrillConfig | None = None,
) -> SidecarReceipt:
    """Writes `rows` (key, id or hash of the caption, tensors by name) as the unit's file. Returns the receipt that counts for the unit.

    Args:
        store: the output.
        described: the set; created in the output if it is not there.
        unit: id of the unit, see `names.unit_of`.
        attempt: random hex digits.
        rows: taken one by one; may add to `counts` meanwhile. bfloat16 as its bits, uint16.
        folder: for the local file.
        counts: numbers about the rows.
        notes: machine and versions.
        failures: where to fail on purpose, for tests.

    Raises:
        BuildError: a tensor that the set does not take, or a value that is not finite.
        ConfigError: the output has a set of this name that was made differently.
        StorageUnavailable: the store or the local disk failed.
    """
    failures = failures or DrillConfig()
    path = Path(folder) / f"{unit[:16]}-{attempt}.sidecar"
    with local_disk(folder):
        writer = SidecarFileWriter(path, described)
        try:
            for row_key, name, tensors in rows:
                payloads = {
                    tensor: tensor_payload(array, described.tensors[tensor].dtype) for tensor, array in tensors.items()
                }
                writer.append(row_key, name, payloads)
            finished = writer.close()
            # Now, and not before: settings whose first unit fails must not keep the name of the set.
            create_set(store, described)
            index = pa.BufferOutputStream()
            pq.write_table(finished.index, index, compression="zstd", write_page_checksum=True)
            index_data = index.getvalue().to_pybytes()
            key = data_key(described.name, unit, attempt)
            drill.fire(failures, "before_upload")
            stored = store.upload(path, key)
        finally:
            writer.discard()
    if stored.size != finished.num_bytes:
        raise BuildError(f"{key} has {stored.size} bytes after the upload of {finished.num_bytes}", stage="write")
    store.write(index_key(key), index_data)
    drill.fire(failures, "after_upload")
    receipt = SidecarReceipt(
        unit=unit,
        attempt=attempt,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        fingerprint=described.fingerprint,
        key=key,
        index_key=index_key(key),
        rows=finished.rows,
        num_bytes=finished.num_bytes,
        sha256=finished.sha256,
        index_bytes=len(index_data),
        index_sha256=hashlib.sha256(index_data).hexdigest(),
        counts=counts or {},
        stats=finished.stats,
        notes=notes or {},
    )
    drill.fire(failures, "before_commit")
    winner = SidecarReceipts(store, described.name, failures).commit(receipt)
    drill.fire(failures, "after_commit")
    if winner.attempt != attempt:
        for each in (key, index_key(key)):
            store.delete(each)
    return winner

"""Description of a latent file, index, receipt or output, read from headers, footers and receipts.

Takes a path or `s3://` URI, returns a JSON-ready dict with a `kind`. Tensors are never read.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.format.columns import METADATA_MEMBER
from pipeline.format.index import read_footer, read_index
from pipeline.format.layout import LAYOUTS, SET_KEYS
from pipeline.ledger.addresses import open_output
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.totals import describe_stats, tally
from pipeline.records import Receipt
from pipeline.storage import locate, open_store
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.storage import Store

DESCRIBED = ("spec", "latent", "normalisation", "container", "versions")
HEAD_BYTES = 64 * 1024  # one request reads the first member of a tar


def inspect_path(uri: str, config: StorageConfig) -> dict[str, Any]:
    """Describes a data file, side index or receipt, or else the output at `uri`.

    Raises:
        InputError: no such object, or a file that Lathe did not write.
        OutputError: a folder that is not a latent set, or one of another format version.
    """
    folder, _, name = uri.rpartition("/")
    if name in SET_KEYS:
        return inspect_output(open_store(folder, config))
    indexes = {layout.index_suffix: _index for layout in LAYOUTS.values()}
    for suffix, read in (indexes | {".parquet": _parquet, ".tar": _tar, ".json": _receipt}).items():
        if uri.endswith(suffix):
            root, key = locate(uri)
            store = open_store(root, config)
            return {"uri": uri, **read(store, key, store.stat(key).size)}
    store, number = open_output(uri, config)
    return inspect_output(store) if number is None else inspect_snapshot(store, number)


def inspect_snapshot(store: Store, number: int) -> dict[str, Any]:
    """Record of a snapshot, with the network metadata of one data file per fingerprint.

    Raises:
        InputError: no such snapshot; the message has the existing ones.
    """
    latent_set = Ledger(store).latent_set()
    snapshots = Snapshots(store)
    snapshot = snapshots.read(number)
    files = snapshots.table(snapshot, "files", ["key", "fingerprint"]).to_pydict()
    first = dict(zip(reversed(files["fingerprint"]), reversed(files["key"]), strict=True))
    found = asdict(snapshot)
    for fingerprint, item in found["fingerprints"].items():
        metadata = file_metadata(store, first[fingerprint]) if fingerprint in first else {}
        item.update({name: metadata.get(name) for name in DESCRIBED})
        item["statistics"] = describe_stats(snapshot.fingerprints[fingerprint].stats)
        del item["stats"]
    return {
        "kind": "snapshot",
        "uri": f"{store.root}@{number}",
        "name": latent_set.name,
        "uuid": latent_set.uuid,
        **found,
    }


def inspect_output(store: Store, *, workers: int = 8) -> dict[str, Any]:
    """Description of an output: name and id, and for each fingerprint its parts, network, buckets, counts, rejects and statistics."""
    ledger = Ledger(store)
    latent_set = ledger.latent_set()
    found = []
    for item in tally(store, workers).values():
        metadata = file_metadata(store, item.sample_file) if item.sample_file else {}
        described = {name: metadata.get(name) for name in DESCRIBED}
        found.append({**item.to_dict(), **described})
    return {
        "kind": "output",
        "uri": store.root,
        "name": latent_set.name,
        "uuid": latent_set.uuid,
        "created": latent_set.created,
        "fingerprints": found,
    }


def file_metadata(store: Store, key: str) -> dict[str, Any]:
    """Metadata of a data file (docs/formats.md).

    Raises:
        InputError: missing, or not a file that Lathe wrote.
    """
    read = _tar if key.endswith(".tar") else _parquet
    metadata: dict[str, Any] = read(store, key, store.stat(key).size)["metadata"]
    return metadata


def _parquet(store: Store, key: str, size: int) -> dict[str, Any]:
    footer, metadata = read_footer(RangedFile(store, key, size), store.uri(key))
    if metadata is None:
        columns = ", ".join(footer.schema.names[:8])
        raise InputError(
            f"{store.uri(key)} is Parquet that Lathe did not write: no 'latentset' metadata; its columns: {columns}"
        )
    return {
        "kind": "parquet",
        "bytes": size,
        "rows": footer.num_rows,
        "row_groups": footer.num_row_groups,
        "columns": list(footer.schema.to_arrow_schema().names),
        "metadata": metadata,
    }


def _tar(store: Store, key: str, size: int) -> dict[str, Any]:
    try:
        with tarfile.open(fileobj=io.BufferedReader(RangedFile(store, key, size), HEAD_BYTES), mode="r:") as archive:
            first = archive.next()
            content = archive.extractfile(first) if first is not None and first.name == METADATA_MEMBER else None
            metadata = None if content is None else json.load(content)
    except tarfile.ReadError as error:
        raise InputError(f"{store.uri(key)} is not a readable tar: {error}") from None
    except ValueError as error:
        raise InputError(f"{store.uri(key)}: {METADATA_MEMBER} is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        name = None if first is None else first.name
        raise InputError(
            f"{store.uri(key)} was not written by Lathe: expected {METADATA_MEMBER} as its first member, found {name}"
        )
    return {"kind": "tar", "bytes": size, "metadata": metadata}


def _index(store: Store, key: str, size: int) -> dict[str, Any]:
    try:
        rows, metadata = read_index(store.read(key))
    except (ValueError, OSError) as error:
        raise InputError(f"{store.uri(key)} cannot be read as a side index: {error}") from None
    return {
        "kind": "index",
        "bytes": size,
        "rows": len(rows),
        "frames": sum(row.num_frames for row in rows),
        "tensor_bytes": sum(span.length for row in rows for span in row.spans()),
        "buckets": sorted({row.bucket for row in rows}),
        "shapes": sorted({row.shape for row in rows}),
        "dtypes": sorted({row.dtype for row in rows}),
        "metadata": metadata,
    }


def _receipt(store: Store, key: str, size: int) -> dict[str, Any]:
    try:
        receipt = Receipt.from_json(store.read(key))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{store.uri(key)} cannot be read as a receipt: {error}") from None
    return {"kind": "receipt", "bytes": size, **receipt.to_dict(), "statistics": describe_stats(receipt.stats)}

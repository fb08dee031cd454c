"""Actions of the Delta protocol that make up a version of the log, and its checkpoint. Plain values in, bytes out; no I/O.

Protocol: https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.columns import parquet_schema
from pipeline.format.stored import OPTIONAL
from pipeline.ledger.manifest import release_memory
from pipeline.records import MemberRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.ledger.snapshots import Snapshot

ENGINE = "lathe"
CHECKPOINT_METADATA = b"lathe"
RANGES = ("id", "fps", "num_frames")  # columns of the table; of paired videos the ranges say whether rows have them
PREFIX_CHARS = 12  # of texts in statistics
MOST_BYTES = 10**12  # of one version
ROWS_AT_ONCE = 4096  # actions of a checkpoint that are Python objects
# A VACUUM with default settings deletes nothing, and writers that do not know the feature refuse to change the table.
PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["lathe-view"]}
CONFIGURATION = {
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.logRetentionDuration": "interval 36500 days",
}
TYPES = {"string": "string", "int64": "long", "int32": "integer", "double": "double", "binary": "binary"}


class DataFile(NamedTuple):
    """A data file: the columns of its manifest row that the log needs."""

    bucket: str
    rows: int
    bytes: int
    ranges: str


def version_bytes(facts: dict[str, Any], when: int | None, actions: Iterable[dict[str, Any]]) -> bytes:
    """One version: `commitInfo` with `facts`, then the actions. `when`: milliseconds since 1970; None: 0.

    `commitInfo` has the number of bytes that follow it, so that a version which was cut off or added to can be told from a whole one. It
    is written last, into room that was left for it, with spaces at its end: a version may have 20 MB, of which there is one copy.
    """

    def first(following: int) -> bytes:
        info = {"engineInfo": ENGINE, "operation": "WRITE", "timestamp": when or 0, "bytes": following, **facts}
        return _line({"commitInfo": info})

    out, room = io.BytesIO(), len(first(MOST_BYTES))
    out.write(bytes(room))
    for action in actions:
        out.write(_line(action))
    line = first(out.tell() - room)
    out.seek(0)
    out.write(line[:-1].ljust(room - 1) + line[-1:])
    return out.getvalue()


def _line(action: dict[str, Any]) -> bytes:
    return json.dumps(action, separators=(",", ":")).encode() + b"\n"


def milliseconds(created: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time."""
    return int(datetime.fromisoformat(created).timestamp() * 1000)


def add(path: str, file: DataFile, when: int, *, brief: bool, changes: bool = True) -> dict[str, Any]:
    """The action `add`; with `brief` its statistics are only the number of rows. `changes`: whether its rows are new in the table."""
    return {
        "path": path,
        "partitionValues": {},
        "size": file.bytes,
        "modificationTime": when,
        "dataChange": changes,
        "stats": json.dumps(_statistics(file, brief=brief), separators=(",", ":")),
    }


def remove(path: str, file: DataFile, when: int, *, changes: bool = True) -> dict[str, Any]:
    """The action `remove`. `changes`: whether its rows are gone."""
    return {"path": path, "deletionTimestamp": when, "dataChange": changes, "size": file.bytes}


def paired_columns(snapshot: Snapshot) -> frozenset[str]:
    """Names of the paired videos of a snapshot's fingerprints. Its files may have columns for each."""
    return frozenset(name for part in snapshot.fingerprints.values() for name in MemberRule.of(part.parts).names)


def metadata(first: Snapshot, paired: Iterable[str]) -> dict[str, Any]:
    """The action `metaData` of the table whose first snapshot is `first`, with columns for these paired videos."""
    return {
        "id": str(uuid.UUID(hashlib.blake2b(first.to_json(), digest_size=16).hexdigest())),
        "format": {"provider": "parquet", "options": {}},
        "schemaString": json.dumps(_delta_schema(paired)),
        "partitionColumns": [],
        "configuration": CONFIGURATION,
        "createdTime": milliseconds(first.created),
    }


def checkpoint(facts: dict[str, Any], metadata: dict[str, Any], adds: Iterator[dict[str, Any]]) -> bytes:
    """Checkpoint of one version, Parquet: protocol, metadata and files. `facts` are stored in its key-value metadata."""
    schema = _checkpoint_schema().with_metadata({CHECKPOINT_METADATA: json.dumps(facts)})
    described = {
        **metadata,
        "format": {"provider": "parquet", "options": []},
        "configuration": list(metadata["configuration"].items()),
    }
    out = io.BytesIO()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        writer.write_table(pa.Table.from_pylist([{"protocol": PROTOCOL}, {"metaData": described}], schema))
        while rows := [
            {"add": {**item, "partitionValues": [], "dataChange": False}} for item in islice(adds, ROWS_AT_ONCE)
        ]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            release_memory()
    return out.getvalue()


def last_checkpoint(version: int, files: int, facts: dict[str, Any]) -> bytes:
    """Contents of `_last_checkpoint`: the checkpoint of `version` has `files` files. `facts` are stored as its tags."""
    tags = {"engineInfo": ENGINE, **{name: str(value) for name, value in facts.items()}}
    return json.dumps({"version": version, "size": files + 2, "tags": tags}).encode()


def _statistics(file: DataFile, *, brief: bool) -> dict[str, Any]:
    if brief:
        return {"numRecords": file.rows}
    known = json.loads(file.ranges)
    ranges = {"bucket": [file.bucket] * 2, **{name: known[name] for name in RANGES if name in known}}
    return {
        "numRecords": file.rows,
        "minValues": {name: _lower(low) for name, (low, _) in sorted(ranges.items())},
        "maxValues": {name: _upper(high) for name, (_, high) in sorted(ranges.items())},
        "nullCount": dict.fromkeys(sorted(ranges), 0),
    }


def _lower(value: Any) -> Any:
    return value[:PREFIX_CHARS] if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    """Upper bound: `~` after a shortened text sorts after all characters of ids and buckets."""
    return f"{value[:PREFIX_CHARS]}~" if isinstance(value, str) and len(value) > PREFIX_CHARS else value


def _delta_schema(paired: Iterable[str]) -> dict[str, Any]:
    """Delta schema with all columns of any Parquet file of an output with these paired videos; columns that a file lacks are null."""
    return {"type": "struct", "fields": list(_fields(parquet_schema(moments=True, store=(*OPTIONAL, *sorted(paired)))))}


def _fields(schema: pa.Schema) -> Iterator[dict[str, Any]]:
    for item in schema:
        kind: Any = TYPES.get(str(item.type))
        if pa.types.is_list(item.type):
            kind = {"type": "array", "elementType": TYPES[str(item.type.value_type)], "containsNull": True}
        yield {"name": item.name, "type": kind, "nullable": True, "metadata": {}}


def _checkpoint_schema() -> pa.Schema:
    texts = pa.map_(pa.string(), pa.string())
    return pa.schema(
        {
            "protocol": pa.struct(
                {
                    "minReaderVersion": pa.int32(),
                    "minWriterVersion": pa.int32(),
                    "writerFeatures": pa.list_(pa.string()),
                }
            ),
            "metaData": pa.struct(
                {
                    "id": pa.string(),
                    "format": pa.struct({"provider": pa.string(), "options": texts}),
                    "schemaString": pa.string(),
                    "partitionColumns": pa.list_(pa.string()),
                    "configuration": texts,
                    "createdTime": pa.int64(),
                }
            ),
            "add": pa.struct(
                {
                    "path": pa.string(),
                    "partitionValues": texts,
                    "size": pa.int64(),
                    "modificationTime": pa.int64(),
                    "dataChange": pa.bool_(),
                    "stats": pa.string(),
                }
            ),
        }
    )

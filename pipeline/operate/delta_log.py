"""Delta Lake log of a published Parquet output, at `data/_delta_log/`: a view of its snapshots for DuckDB, Polars, Spark, Ray and others.

Version 0 is the empty table, version n is snapshot n. The log is derived from snapshots: it may be deleted and rebuilt at any time. It is
below `data/`, with paths relative to that, so that a foreign VACUUM sees neither receipts nor indexes. A file with a row that does not
count is left out entirely, because readers without deletion vectors would show that row. After a takedown all versions are rewritten, so
that none names the file. Protocol: https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import uuid
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.format.columns import parquet_schema
from pipeline.format.index import read_index
from pipeline.format.layout import DATA
from pipeline.ledger.manifest import release_memory
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import Takedowns, read_takedowns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.storage import Store

LOG = f"{DATA}_delta_log/"
ENGINE = "lathe"
NAME = re.compile(r"(?P<version>\d{20})(?P<kind>\.json|\.checkpoint\.parquet)")
LAST_CHECKPOINT = "_last_checkpoint"
COLUMNS = ["key", "bucket", "rows", "bytes", "ranges", "hidden", "index_key"]
HEAD_BYTES = 64 * 1024  # read of a version to get its first line
PREFIX_CHARS = 12  # of texts in statistics
ROWS_AT_ONCE = 4096  # of a manifest turned into Python objects
# A version that adds more files has their statistics in a checkpoint, in a tenth of the space.
MANY = 2000
# A VACUUM with default settings deletes nothing, and writers that do not know the feature refuse to change the table.
PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["lathe-view"]}
CONFIGURATION = {
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.logRetentionDuration": "interval 36500 days",
}
TYPES = {"string": "string", "int64": "long", "int32": "integer", "double": "double", "binary": "binary"}


@dataclass(frozen=True, slots=True)
class DeltaView:
    """State of the log: its newest version, and the files and rows of that snapshot that it leaves out."""

    version: int
    left_out_files: int
    left_out_rows: int

    def notice(self) -> str | None:
        """Notice for users if files are left out."""
        if not self.left_out_files:
            return None
        return (
            f"the Delta view of snapshot {self.version} lacks {self.left_out_rows} rows of {self.left_out_files} files, "
            "which also hold rows that do not count"
        )


class DeltaLog:
    """Delta log of one output."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self) -> None:
        """Checks that only Lathe wrote the log.

        Raises:
            OutputError: another program wrote to it.
        """
        versions = []
        for name in self._names():
            match = NAME.fullmatch(name)
            if match is None and name != LAST_CHECKPOINT:
                raise self._foreign(name)
            if match is not None and match["kind"] == ".json":
                versions.append(int(match["version"]))
        if versions and not self._ours(max(versions)):
            raise self._foreign(f"{max(versions):020}.json")

    def sync(self) -> DeltaView | None:
        """Writes missing versions, or all of them after new takedowns. Returns None if no snapshot has Parquet files.

        Raises:
            OutputError: another program wrote to the log.
        """
        snapshots = Snapshots(self._store)
        numbers = snapshots.numbers()
        if not numbers:
            return None
        self.check()
        takedowns = read_takedowns(self._store)
        mark = _mark(takedowns)
        there = self._versions()
        first = next((n for n in range(numbers[-1] + 1) if n not in there), numbers[-1] + 1)
        if 0 not in there or self._commit_info(0).get("takedowns") != mark:
            first = 0
        writer = _Writer(self._store, snapshots, takedowns, mark, numbers, replace=first == 0 and bool(there))
        return writer.write(first)

    def _names(self) -> list[str]:
        return [info.key.removeprefix(LOG) for info in self._store.list(LOG)]

    def _versions(self) -> set[int]:
        found = (NAME.fullmatch(name) for name in self._names())
        return {int(match["version"]) for match in found if match and match["kind"] == ".json"}

    def _ours(self, version: int) -> bool:
        return str(self._commit_info(version).get("engineInfo", "")).startswith(ENGINE)

    def _commit_info(self, version: int) -> dict[str, Any]:
        """`commitInfo` of a version; empty if it does not begin with one."""
        key = _key(version)
        length = min(HEAD_BYTES, self._store.stat(key).size)
        try:
            line = json.loads(self._store.read_range(key, 0, length).split(b"\n", 1)[0])
            return dict(line["commitInfo"])
        except (ValueError, KeyError, TypeError):
            return {}

    def _foreign(self, name: str) -> OutputError:
        return OutputError(
            f"{LOG}{name} was not written by Lathe: only Lathe may write this log. To keep foreign changes, copy the data; "
            f"to rebuild the log, delete {self._store.uri(LOG)} and publish again, or use --no-delta",
            uri=self._store.uri(LOG + name),
        )


class _File(NamedTuple):
    """Data file: the columns of its manifest row that the log needs."""

    bucket: str
    rows: int
    bytes: int
    ranges: str


class _Version(NamedTuple):
    """Contents of one version. `files`: by path below `data/`; `snapshot` None: no snapshot has this number."""

    files: dict[str, _File]
    snapshot: Snapshot | None
    left_out_files: int
    left_out_rows: int


class _Writer:
    """Writer of consecutive versions."""

    def __init__(
        self, store: Store, snapshots: Snapshots, takedowns: Takedowns, mark: str, numbers: list[int], *, replace: bool
    ) -> None:
        self._store, self._snapshots, self._takedowns, self._mark = store, snapshots, takedowns, mark
        self._numbers = numbers
        self._replace = replace
        self._taken: dict[str, bool] = {}  # file -> whether a takedown hides a row of it

    def write(self, first: int) -> DeltaView | None:
        """Writes all versions from `first` to the newest. Returns None if no snapshot has a Parquet file."""
        newest = self._numbers[-1]
        if first == 0 and not any(self._has_parquet(number) for number in self._numbers):
            return None
        if self._replace:
            for info in list(self._store.list(LOG)):
                if not info.key.endswith(".json"):
                    self._store.delete(info.key)
        last = self._version(first - 1)
        for number in range(max(first, 1), newest + 1):
            found = self._version(number)
            self._commit(number, found, last.files)
            last = found
        if first == 0:  # written last: without it, the next run starts again
            lines = [{"protocol": PROTOCOL}, {"metaData": self._metadata()}]
            self._put(0, [_info(self._mark, None, {}), *lines])
        return DeltaView(newest, last.left_out_files, last.left_out_rows)

    def _has_parquet(self, number: int) -> bool:
        keys = self._snapshots.table(self._snapshots.read(number), "files", ["key"])["key"]
        return bool(pc.any(pc.ends_with(keys, ".parquet")).as_py())

    def _version(self, number: int) -> _Version:
        if number not in self._numbers:
            return _Version({}, None, 0, 0)
        snapshot = self._snapshots.read(number)
        files: dict[str, _File] = {}
        left_out = []
        for batch in self._snapshots.table(snapshot, "files", COLUMNS).to_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                if not row["key"].endswith(".parquet"):
                    continue
                if row["hidden"] or self._is_taken(row):
                    left_out.append(row["rows"])
                else:
                    path = row["key"].removeprefix(DATA)
                    files[path] = _File(sys.intern(row["bucket"]), row["rows"], row["bytes"], row["ranges"])
        release_memory()
        return _Version(files, snapshot, len(left_out), sum(left_out))

    def _is_taken(self, row: dict[str, Any]) -> bool:
        if not self._takedowns:
            return False
        key = row["key"]
        if key not in self._taken:
            rows, _ = read_index(self._store.read(row["index_key"]))
            self._taken[key] = any(self._takedowns.hides(item) for item in rows)
        return self._taken[key]

    def _commit(self, number: int, found: _Version, before: dict[str, _File]) -> None:
        files, snapshot = found.files, found.snapshot
        if snapshot is None:  # number of a killed publisher: nothing changes
            self._put(number, [_info(self._mark, None, {})])
            return
        when = _milliseconds(snapshot.created)
        added = [path for path in sorted(files) if path not in before]
        removed = [path for path in sorted(before) if path not in files]
        many = len(added) > MANY
        head = [_info(self._mark, when, {"snapshot": number, "fingerprints": sorted(snapshot.fingerprints)})]
        removes = (
            {"path": path, "deletionTimestamp": when, "dataChange": True, "size": before[path].bytes}
            for path in removed
        )
        adds = (_add(path, files[path], when, brief=many) for path in added)
        self._put(number, chain(head, ({"remove": item} for item in removes), ({"add": item} for item in adds)))
        if many:
            release_memory()
            adds = (_add(path, files[path], when, brief=False) for path in sorted(files))
            self._store.write(f"{LOG}{number:020}.checkpoint.parquet", _checkpoint(self._metadata(), adds))
            last = {"version": number, "size": len(files) + 2}
            self._store.write(LOG + LAST_CHECKPOINT, json.dumps(last).encode())

    def _metadata(self) -> dict[str, Any]:
        first = self._snapshots.read(self._numbers[0])
        return {
            "id": str(uuid.UUID(hashlib.blake2b(first.to_json(), digest_size=16).hexdigest())),
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps(_delta_schema()),
            "partitionColumns": [],
            "configuration": CONFIGURATION,
            "createdTime": _milliseconds(first.created),
        }

    def _put(self, version: int, lines: Iterable[dict[str, Any]]) -> None:
        key, out = _key(version), io.BytesIO()
        for line in lines:
            out.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        data = out.getvalue()
        if self._replace:
            self._store.write(key, data)
        elif not self._store.put_if_absent(key, data) and self._store.read(key) != data:
            raise OutputError(
                f"{key} exists with other contents: another publisher with other takedowns, or a foreign writer. Publish again",
                uri=self._store.uri(key),
            )


def _key(version: int) -> str:
    return f"{LOG}{version:020}.json"


def _mark(takedowns: Takedowns) -> str:
    """Digest of the takedowns applied to a log."""
    return hashlib.blake2b("\n".join(item.key for item in takedowns.records).encode(), digest_size=8).hexdigest()


def _info(mark: str, when: int | None, facts: dict[str, Any]) -> dict[str, Any]:
    info = {"engineInfo": ENGINE, "operation": "WRITE", "timestamp": when or 0, "takedowns": mark, **facts}
    return {"commitInfo": info}


def _milliseconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp() * 1000)


def _add(path: str, file: _File, when: int, *, brief: bool) -> dict[str, Any]:
    return {
        "path": path,
        "partitionValues": {},
        "size": file.bytes,
        "modificationTime": when,
        "dataChange": True,
        "stats": json.dumps(_statistics(file, brief=brief), separators=(",", ":")),
    }


def _statistics(file: _File, *, brief: bool) -> dict[str, Any]:
    if brief:
        return {"numRecords": file.rows}
    ranges = {"bucket": [file.bucket] * 2, **json.loads(file.ranges)}
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


def _delta_schema() -> dict[str, Any]:
    """Delta schema with all columns of any Parquet file of an output; columns that a file lacks are null."""
    return {"type": "struct", "fields": list(_fields(parquet_schema(moments=True)))}


def _fields(schema: pa.Schema) -> Iterator[dict[str, Any]]:
    for item in schema:
        kind: Any = TYPES.get(str(item.type))
        if pa.types.is_list(item.type):
            kind = {"type": "array", "elementType": TYPES[str(item.type.value_type)], "containsNull": True}
        yield {"name": item.name, "type": kind, "nullable": True, "metadata": {}}


def _checkpoint(metadata: dict[str, Any], adds: Iterator[dict[str, Any]]) -> bytes:
    """Parquet checkpoint: protocol, metadata and files of one version."""
    texts = pa.map_(pa.string(), pa.string())
    schema = pa.schema(
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

"""Published snapshots of an output: immutable, numbered lists of the data files that count. Readers start here.

`_snapshots/{n}.json` is the record; it names its tables by key, size and SHA-256. Tables are written first, the record last, create-only: a
snapshot is visible completely or not at all. Tables that no record names were left by killed or second publishers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.config import DrillConfig
from pipeline.errors import InputError, NotFound, OutputError, PublishFailed
from pipeline.format.layout import SNAPSHOTS, snapshot_key, snapshot_number, snapshot_table_key
from pipeline.ledger.copies import COPIES, NO_COPIES, Copies
from pipeline.ledger.manifest import (
    ADDED_LATER,
    CHOICES,
    FILES,
    OPEN,
    RECEIPTS,
    column_names,
    from_parquet,
    read_batches,
)
from pipeline.ledger.record_checks import check_record
from pipeline.process import kill_points as drill
from pipeline.records import ChannelStats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa

    from pipeline.storage import Store

FORMAT_VERSION = 1
NUMBERED = re.compile(r"(?P<output>.+)@(?P<number>[0-9]{1,18})", re.DOTALL)
LISTED_NUMBERS = 10
SCHEMAS = {"files": FILES, "receipts": RECEIPTS, "choices": CHOICES, "open": OPEN, "copies": COPIES}
NAMED_IN_RECORD = 1000  # open shards; if there are more, all are in a table


@dataclass(frozen=True, slots=True)
class Check:
    """One check before publishing. `numbers`: measured values and limits, JSON-ready. `message`: by how much it failed."""

    name: str
    ok: bool
    message: str
    numbers: dict[str, Any] = field(default_factory=dict)
    judged: bool = True  # False: nothing to compare, for example no parent or no source


@dataclass(frozen=True, slots=True)
class TableRef:
    """One table of a snapshot."""

    key: str
    num_bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class PublishedFingerprint:
    """Part of a snapshot with one fingerprint. `stats` covers all its rows."""

    parts: dict[str, Any]
    network: str
    shards: int
    files: int
    rows: int
    frames: int
    bytes: int  # of data files
    stats: ChannelStats | None
    constants: dict[str, Any]  # scale, shift, mean, std that the network's authors recommend


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The record of one snapshot. `counts`: shards, samples, encoded, rejected, damaged, clips_rejected, rows, frames, files, bytes."""

    number: int
    parent: int | None
    created: str  # UTC, ISO 8601
    counts: dict[str, int]
    rejects: dict[str, int]  # by reason
    warnings: dict[str, int]  # see `Receipt.warnings`; of receipts whose rows all count
    buckets: dict[str, dict[str, int]]  # files, rows, frames, bytes
    fingerprints: dict[str, PublishedFingerprint]
    changes: dict[str, int]  # against the parent: inputs added, replaced, removed; files and rows added and dropped
    lineage: dict[str, Any]
    checks: tuple[Check, ...]
    open_shards: tuple[str, ...]  # known not to be done: inputs, builds, cut-off receipts; the first `NAMED_IN_RECORD`
    takedowns: tuple[str, ...]  # keys of those applied; readers also apply later ones
    passed_over: tuple[int, ...]  # numbers of damaged snapshots, found with `--rebuild` by this one or an ancestor
    tables: dict[str, TableRef]
    videos: dict[str, dict[str, int]] = field(default_factory=dict)  # see `CountedReceipt.videos`; sums over receipts

    @property
    def num_open(self) -> int:
        """Number of shards and inputs that are known not to be done."""
        return self.tables["open"].rows if "open" in self.tables else len(self.open_shards)

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        values = {"format": "latentset-snapshot", "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Snapshot:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: not the record of a snapshot, or one of another format version.
        """
        raw: Any = json.loads(data)
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
        if (kind := raw.pop("format")) != "latentset-snapshot":
            raise ValueError(f"its format is {kind!r}, expected 'latentset-snapshot'")
        if (found := raw.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {found!r}, this Lathe reads {FORMAT_VERSION}")
        check_record(raw)
        prints = {
            name: PublishedFingerprint(
                **{**item, "stats": None if item["stats"] is None else ChannelStats.from_dict(item["stats"])}
            )
            for name, item in raw["fingerprints"].items()
        }
        tables = {name: TableRef(**item) for name, item in raw["tables"].items()}
        checks = tuple(Check(**item) for item in raw["checks"])
        names = {name: tuple(raw[name]) for name in ("open_shards", "takedowns", "passed_over")}
        return cls(**{**raw, **names, "fingerprints": prints, "tables": tables, "checks": checks})


def split_number(output: str) -> tuple[str, int | None]:
    """`out@3` -> (`out`, 3); without a number (`out`, None). `addresses.open_output` also looks what exists."""
    match = NUMBERED.fullmatch(output)
    return (match["output"], int(match["number"])) if match else (output, None)


class Snapshots:
    """Snapshots of one output. Stateless except for the store."""

    def __init__(self, store: Store, failures: DrillConfig | None = None) -> None:
        """`failures`: where to fail on purpose, for tests."""
        self._store = store
        self._drill = failures or DrillConfig()

    def numbers(self) -> list[int]:
        """Numbers of all snapshots, ascending, by one LIST."""
        return sorted(number for number, size in self._names() if size)

    def newest_and_next(self) -> tuple[Snapshot | None, int]:
        """The newest snapshot and the number of the next, by one LIST: with two, another publisher's snapshot could come between them.

        The next number is the first free one: a record of zero bytes (a kill on a mount without hard links) occupies its number.
        """
        numbers, following = self._numbers_and_next()
        return (self.read(numbers[-1]) if numbers else None), following

    def newest_whole(self) -> tuple[Snapshot | None, int, dict[int, OutputError]]:
        """As `newest_and_next`, without snapshots of which the record or a table is lost or damaged. Reads all; their errors by number.

        Raises:
            OutputError: a record of another format version.
        """
        numbers, following = self._numbers_and_next()
        newest: Snapshot | None = None
        errors: dict[int, OutputError] = {}
        for number in numbers:
            try:
                newest = self.whole(number)
            except OutputError as error:
                if self._is_other_version(number):
                    raise
                errors[number] = error
        return newest, following, errors

    def whole(self, number: int) -> Snapshot:
        """As `read`, after reading all tables of the snapshot.

        Raises:
            OutputError: also if a table is missing, or not the bytes that were published.
        """
        found = self.read(number)
        for name in found.tables:
            self._read(found, name)
        return found

    def _numbers_and_next(self) -> tuple[list[int], int]:
        names = self._names()
        numbers, taken = sorted(number for number, size in names if size), {number for number, _ in names}
        return numbers, next(n for n in itertools.count(max(numbers, default=0) + 1) if n not in taken)

    def _names(self) -> list[tuple[int, int]]:
        found = [(snapshot_number(info.key), info.size) for info in self._store.list(SNAPSHOTS, recursive=False)]
        return [(number, size) for number, size in found if number is not None]

    def latest(self) -> Snapshot | None:
        """The newest snapshot; None if nothing is published."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def read(self, number: int) -> Snapshot:
        """The record of one snapshot.

        Raises:
            InputError: no snapshot of this number; the message has the existing ones.
            OutputError: an object that is not a record of this format version.
        """
        key = snapshot_key(number)
        try:
            found = Snapshot.from_json(self._store.read(key))
            if found.number != number:
                raise ValueError(f"it is the record of snapshot {found.number}")
            return found
        except NotFound:
            raise InputError(f"{self._store.root} has no snapshot {number}; {self._available()}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{key} cannot be read as a snapshot: {error}"
            if self._is_other_version(number):
                raise OutputError(f"{message}; use the Lathe that made it", uri=self._store.uri(key)) from None
            raise self._damaged(message, key) from None

    def _is_other_version(self, number: int) -> bool:
        try:
            raw = json.loads(self._store.read(snapshot_key(number)))
            return bool(raw["format"] == "latentset-snapshot" and raw["format_version"] != FORMAT_VERSION)
        except (ValueError, KeyError, TypeError):
            return False

    def get(self, number: int | None) -> Snapshot:
        """`read`, or the newest without a number.

        Raises:
            InputError: no such snapshot, or nothing is published.
        """
        if number is not None:
            return self.read(number)
        if (found := self.latest()) is None:
            raise InputError(f"{self._store.root} has no snapshot; run `lathe publish {self._store.root}`")
        return found

    def _available(self) -> str:
        numbers = self.numbers()
        if not numbers:
            return "nothing is published yet; run `lathe publish`"
        listed = ", ".join(map(str, numbers[-LISTED_NUMBERS:]))
        return f"there are {listed}" if len(numbers) <= LISTED_NUMBERS else f"there are {len(numbers)}, up to {listed}"

    def table(self, snapshot: Snapshot, name: str, columns: list[str] | None = None) -> pa.Table:
        """A table of a snapshot: `files`, `receipts`, `choices`, `open` or `copies`; empty if the snapshot has none of this name.

        Raises:
            OutputError: missing, or not the bytes that were published.
        """
        reference = snapshot.tables.get(name)
        if reference is None:
            table = SCHEMAS[name].empty_table()
            return table if columns is None else table.select(columns)
        return from_parquet(self._read(snapshot, name), columns)

    def open_shards(self, snapshot: Snapshot) -> tuple[str, ...]:
        """All that is known not to be done, also if the record names only a part of it. Raises as `table`."""
        if "open" not in snapshot.tables:
            return snapshot.open_shards
        return tuple(self.table(snapshot, "open")["name"].to_pylist())

    def batches(self, snapshot: Snapshot, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Rows of a table, without the whole of it in memory. Raises as `table`."""
        if name in snapshot.tables:
            yield from read_batches(self._read(snapshot, name), columns)

    def _read(self, snapshot: Snapshot, name: str) -> bytes:
        reference = snapshot.tables[name]
        key = reference.key
        try:
            data = self._store.read(key)
        except NotFound:
            raise self._damaged(f"snapshot {snapshot.number} lacks its table {key}", key) from None
        if (found := hashlib.sha256(data).hexdigest()) != reference.sha256:
            raise self._damaged(
                f"{key} is not the table that was published: sha256 {found}, expected {reference.sha256}", key
            )
        names, expected = column_names(data), SCHEMAS[name].names
        if names != [each for each in expected if each in names or each not in ADDED_LATER]:
            raise self._damaged(f"{key} has the columns {names}, expected {expected}", key)
        return data

    def _damaged(self, message: str, key: str) -> OutputError:
        root = self._store.root
        return OutputError(
            f"{message}; restore it, or make a new snapshot that does not need it: lathe publish {root} --rebuild",
            uri=self._store.uri(key),
        )

    def download(self, snapshot: Snapshot, name: str, path: Path) -> Path:
        """A table of a snapshot as a local Parquet file. Raises as `table`."""
        path.write_bytes(self._read(snapshot, name))
        return path

    def write_tables(self, number: int, tables: dict[str, Path]) -> dict[str, TableRef]:
        """Uploads the tables of snapshot `number`, Parquet files. Readers ignore them until `create`."""
        written = {}
        for name, path in tables.items():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            key = snapshot_table_key(number, name, digest)
            drill.fire(self._drill, "before_manifest")
            self._store.upload(path, key)
            written[name] = TableRef(key, path.stat().st_size, digest, pq.read_metadata(path).num_rows)
        return written

    def create(self, snapshot: Snapshot) -> None:
        """Makes the snapshot visible.

        Raises:
            PublishFailed: another publisher created the snapshot of this number, or a later one, first.
        """
        key, data = snapshot_key(snapshot.number), snapshot.to_json()
        drill.fire(self._drill, "before_snapshot")
        # `lathe gc` may have deleted the record of this number, and tables of this run, since others published.
        later = any(number > snapshot.number for number in self.numbers())
        created = not later and self._store.put_if_absent(key, data)
        drill.fire(self._drill, "after_snapshot")
        # Read back in any case: some stores accept If-None-Match but do not decide a race with it.
        if not created or self._store.read(key) != data:
            raise PublishFailed(
                f"another publisher was first: snapshot {snapshot.number} of {self._store.root} is theirs, nothing of this "
                "run was published; run again to publish what that snapshot does not cover"
            )

    def check_stays(self, snapshot: Snapshot) -> None:
        """Reads the record of a created snapshot once more, when a put that another publisher sent at the same time has arrived.

        Raises:
            PublishFailed: the record is another publisher's.
        """
        if self._store.read(snapshot_key(snapshot.number)) != snapshot.to_json():
            raise PublishFailed(
                f"another publisher replaced the record of snapshot {snapshot.number}, which {self._store.root} did not refuse; run again "
                "to publish what theirs does not cover, and let only one run at a time on this store"
            )


def published_copies(store: Store, number: int | None = None) -> Copies:
    """Rows that compactions copied, as a snapshot has them, the newest without a number; none if nothing is published.

    Raises as `Snapshots.table`.
    """
    snapshots = Snapshots(store)
    found = snapshots.latest() if number is None else snapshots.read(number)
    return NO_COPIES if found is None or "copies" not in found.tables else Copies(snapshots.table(found, "copies"))

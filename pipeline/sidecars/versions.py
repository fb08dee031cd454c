"""Versions of a sidecar set: immutable, numbered lists of its files. Readers start here.

`_sidecars/{name}/versions/{n}.json` is the record, created last and only if absent; it names its table of files by SHA-256. Version n
has the files of version n-1 and those of receipts since. A key counts in the file that showed it first, so its tensors never change.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import DrillConfig
from pipeline.errors import InputError, NotFound, OutputError, PublishFailed
from pipeline.process import kill_points as drill
from pipeline.records import ChannelStats
from pipeline.sidecars.description import read_set, set_names
from pipeline.sidecars.file_index import packed_keys, read_index_table, unpacked_keys
from pipeline.sidecars.names import table_key, version_key, version_of_key, versions_prefix
from pipeline.sidecars.receipts import SidecarReceipts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pipeline.sidecars.receipts import SidecarReceipt
    from pipeline.storage import Store

FORMAT = "latentset-sidecar-version"
FORMAT_VERSION = 1
TRIES = 20  # of making the next version, where others make theirs at the same time
MOST_COVERED = 1000  # coverages that a record lists, the newest ones
FILES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("index_key", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("index_sha256", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("keys", pa.large_binary(), nullable=False),  # 16 bytes a row, in the order of the file
        pa.field("hidden", pa.list_(pa.int32()), nullable=False),  # rows whose key counts in an earlier file
    ]
)


@dataclass(frozen=True, slots=True)
class Coverage:
    """A snapshot of which every row has its tensors in a version. `captions`: the captions that were embedded; none for rows by id."""

    snapshot: int
    captions: tuple[str, ...] = ()
    fingerprint: str = ""  # of the latents


@dataclass(frozen=True, slots=True)
class SetVersion:
    """Record of one version. `rows`: keys that count. `stats`: over all stored values of each tensor. `captions`: sources of captions that
    were embedded in this or an earlier version, whether or not a snapshot is covered; `prune` keeps their tensors.
    """

    name: str
    number: int
    created: str  # UTC, ISO 8601
    fingerprint: str
    rows: int
    files: int
    num_bytes: int
    counts: dict[str, int]
    stats: dict[str, ChannelStats]
    covers: tuple[Coverage, ...]
    table: str
    table_sha256: str
    captions: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SetVersion:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: not the record of a version, or one of another format version.
        """
        raw: Any = json.loads(data)
        found = raw.pop("format"), raw.pop("format_version")
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {found}, this Lathe reads {FORMAT} {FORMAT_VERSION}")
        stats = {name: ChannelStats.from_dict(one) for name, one in raw["stats"].items()}
        covers = tuple(Coverage(one["snapshot"], tuple(one["captions"]), one["fingerprint"]) for one in raw["covers"])
        return cls(**{**raw, "stats": stats, "covers": covers, "captions": tuple(raw.get("captions", ()))})


@dataclass(slots=True)
class _Sums:
    """Counts and statistics of receipts together."""

    counts: dict[str, int] = field(default_factory=dict)
    stats: dict[str, ChannelStats] = field(default_factory=dict)

    def with_receipts(self, receipts: Iterable[SidecarReceipt]) -> _Sums:
        for one in receipts:
            for name, value in one.counts.items():
                self.counts[name] = self.counts.get(name, 0) + value
            for name, found in one.stats.items():
                self.stats[name] = self.stats[name].merge(found) if name in self.stats else found
        return self


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a version that is to be made holds."""

    table: pa.Table
    sums: _Sums
    covers: tuple[Coverage, ...]
    captions: tuple[str, ...]


class SetVersions:
    """Versions of one set. Stateless except for the store."""

    def __init__(self, store: Store, name: str, failures: DrillConfig | None = None) -> None:
        """`failures`: where to fail on purpose, for tests."""
        self._store, self._name, self._drill = store, name, failures or DrillConfig()

    def numbers(self) -> list[int]:
        """Numbers of all versions, ascending, by one LIST. An empty record, left by a kill on a mount without hard links, is not one."""
        return [number for number, size in self._listed() if size]

    def _listed(self) -> list[tuple[int, int]]:
        listed = self._store.list(versions_prefix(self._name), recursive=False)
        return sorted((number, info.size) for info in listed if (number := version_of_key(self._name, info.key)))

    def latest(self) -> SetVersion | None:
        """The newest version; None if there is none. Raises as `read`."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def read(self, number: int | None = None) -> SetVersion:
        """The record of one version, of the newest without a number.

        Raises:
            InputError: no set of this name, or no such version.
            OutputError: an object that is not a record of this format version.
        """
        if number is None:
            if (found := self.latest()) is not None:
                return found
            read_set(self._store, self._name)
            raise InputError(f"sidecar set {self._name} of {self._store.root} is not finished; run `lathe embed` again")
        key = version_key(self._name, number)
        try:
            found = SetVersion.from_json(self._store.read(key))
        except NotFound:
            read_set(self._store, self._name)
            there = ", ".join(map(str, self.numbers()[-10:])) or "none"
            raise InputError(
                f"sidecar set {self._name} of {self._store.root} has no version {number}; there are {there}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{key} cannot be read as a version of sidecars: {error}; restore it", uri=self._store.uri(key)
            ) from None
        return found

    def files(self, version: SetVersion) -> pa.Table:
        """Table `FILES` of a version.

        Raises:
            OutputError: missing, or not the bytes that were recorded.
        """
        key = version.table
        try:
            data = self._store.read(key)
        except NotFound:
            raise OutputError(
                f"version {version.number} of {self._name} lacks its table {key}", uri=self._store.uri(key)
            ) from None
        if (found := hashlib.sha256(data).hexdigest()) != version.table_sha256:
            raise OutputError(
                f"{key} is not the table that was recorded: sha256 {found}, expected {version.table_sha256}",
                uri=self._store.uri(key),
            )
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)

    def keys_done(self) -> np.ndarray:
        """Keys in the newest version and in receipts since, `S16`, each once, sorted.

        Raises:
            OutputError: a table, receipt or index that cannot be read.
        """
        newest = self.latest()
        table = FILES.empty_table() if newest is None else self.files(newest)
        parts = [unpacked_keys(one) for one in table["keys"].to_pylist()]
        parts += [unpacked_keys(row["keys"]) for row in map(self._file_row, self._new_receipts(table))]
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, "S16")

    def publish(self, coverage: Coverage | None = None, captions: tuple[str, ...] = ()) -> SetVersion:
        """Makes the next version of all receipts; returns the newest one if that has nothing new to say.

        `coverage`: what has all its rows now. `captions`: sources that were embedded, also where some rows could not be seen.

        Raises:
            InputError: nothing is finished.
            OutputError: a table, receipt or index that cannot be read.
            PublishFailed: other runs made a version each time.
        """

        def following(newest: SetVersion | None, table: pa.Table) -> _Contents | None:
            receipts = self._new_receipts(table)
            covers = () if newest is None else newest.covers
            more = () if coverage is None or coverage in covers else (coverage,)
            known = _captions(newest)
            sources = tuple(sorted({*known, *captions, *(() if coverage is None else coverage.captions)}))
            if newest is None and not receipts:
                raise InputError(f"sidecar set {self._name} of {self._store.root} has no finished unit of work")
            if newest is not None and not receipts and not more and sources == known:
                return None
            added = pa.Table.from_pylist([self._file_row(one) for one in receipts], FILES)
            before = _Sums() if newest is None else _Sums(dict(newest.counts), dict(newest.stats))
            return _Contents(
                pa.concat_tables([table, added]), before.with_receipts(receipts), (*covers, *more), sources
            )

        return self._make(following)

    def publish_without(self, pruned: Mapping[str, SidecarReceipt | None]) -> SetVersion:
        """Makes the next version, where the files of these units are replaced by those of other receipts, or left out. It covers nothing:
        the next `lathe embed` finds out. Receipts of the units are deleted before. Raises as `publish`.
        """

        def following(newest: SetVersion | None, table: pa.Table) -> _Contents | None:
            rows = table.to_pylist()
            if not pruned.keys() & {row["unit"] for row in rows}:
                return None
            kept: dict[str, dict[str, Any]] = {}  # by unit
            for row in rows:  # in the place of the file that it replaces: a key counts in the first file that has it
                instead = pruned.get(row["unit"])
                if instead is not None:
                    kept.setdefault(instead.unit, self._file_row(instead))
                elif row["unit"] not in pruned:
                    kept.setdefault(row["unit"], row)
            receipts = [one for one in SidecarReceipts(self._store, self._name).all() if one.unit not in pruned]
            for one in receipts:
                if one.unit not in kept:
                    kept[one.unit] = self._file_row(one)
            rows_kept = pa.Table.from_pylist(list(kept.values()), FILES)
            return _Contents(rows_kept, _Sums().with_receipts(receipts), (), _captions(newest))

        return self._make(following)

    def _make(self, following: Callable[[SetVersion | None, pa.Table], _Contents | None]) -> SetVersion:
        described = read_set(self._store, self._name)
        for _ in range(TRIES):
            newest = self.latest()
            contents = following(newest, FILES.empty_table() if newest is None else self.files(newest))
            if contents is None and newest is not None:
                return newest
            if contents is None:
                raise InputError(f"sidecar set {self._name} of {self._store.root} has no version")
            listed = self._listed()
            made = self._written(listed[-1][0] + 1 if listed else 1, contents, described.fingerprint)
            key, data = version_key(self._name, made.number), made.to_json()
            drill.fire(self._drill, "before_snapshot")
            self._store.put_if_absent(key, data)
            drill.fire(self._drill, "after_snapshot")
            if self._store.read(key) == data:
                return made
        raise PublishFailed(f"other runs made versions of {self._name} at the same time, {TRIES} times; run again")

    def _new_receipts(self, table: pa.Table) -> list[SidecarReceipt]:
        return SidecarReceipts(self._store, self._name).all(without=set(table["unit"].to_pylist()))

    def _file_row(self, receipt: SidecarReceipt) -> dict[str, Any]:
        index = read_index_table(self._store, receipt.index_key, receipt.index_sha256)
        return {
            "key": receipt.key,
            "index_key": receipt.index_key,
            "rows": receipt.rows,
            "bytes": receipt.num_bytes,
            "sha256": receipt.sha256,
            "index_sha256": receipt.index_sha256,
            "unit": receipt.unit,
            "attempt": receipt.attempt,
            "keys": packed_keys(index),
            "hidden": [],
        }

    def _written(self, number: int, contents: _Contents, fingerprint: str) -> SetVersion:
        """The record of a version whose table is written."""
        table = with_hidden(contents.table)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(data).hexdigest()
        key = table_key(self._name, number, digest)
        drill.fire(self._drill, "before_manifest")
        self._store.write(key, data)
        return SetVersion(
            name=self._name,
            number=number,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint,
            rows=sum(table["rows"].to_pylist()) - sum(map(len, table["hidden"].to_pylist())),
            files=table.num_rows,
            num_bytes=sum(table["bytes"].to_pylist()),
            counts=contents.sums.counts,
            stats=contents.sums.stats,
            covers=contents.covers[-MOST_COVERED:],
            table=key,
            table_sha256=digest,
            captions=contents.captions,
        )


def _captions(newest: SetVersion | None) -> tuple[str, ...]:
    """`captions` of a version; records of Lathe before they had it name them in `covers` only."""
    if newest is None:
        return ()
    return tuple(sorted({*newest.captions, *(source for one in newest.covers for source in one.captions)}))


def newest_versions(store: Store) -> dict[str, int]:
    """Number of the newest version of each set of an output, by two LISTs a set and no reads; sets without one are left out."""
    found = {name: SetVersions(store, name).numbers() for name in set_names(store)}
    return {name: numbers[-1] for name, numbers in found.items() if numbers}


def with_hidden(table: pa.Table) -> pa.Table:
    """The table `FILES`, where rows whose key came before are hidden. Files that were there before keep what they hide."""
    keys = unpacked_keys(b"".join(table["keys"].to_pylist()))
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    ends = np.cumsum(table["rows"].to_numpy()).tolist()
    hidden = [np.flatnonzero(~first[begin:end]).tolist() for begin, end in zip([0, *ends], ends, strict=False)]
    at = table.schema.get_field_index("hidden")
    return table.set_column(at, FILES.field(at), pa.array(hidden, FILES.field(at).type))

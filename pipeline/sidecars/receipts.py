"""Receipts of a sidecar set: which units of work are done, each with its file. Created only if absent; the first one counts.

A unit is a group of rows that one attempt writes. An object of zero bytes or of incomplete JSON is not a receipt. Where the store cannot
refuse a second writer, or a receipt was cut off, receipts are named by their attempt, and the lowest (created, attempt) counts.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import DrillConfig
from pipeline.errors import BuildError, NotFound, OutputError
from pipeline.process import kill_points as drill
from pipeline.records import ChannelStats
from pipeline.sidecars.names import receipt_key, receipts_prefix, unit_of_receipt
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.storage import Store

FORMAT_VERSION = 1
WORKERS = 16  # threads that read receipts of a remote store


@dataclass(frozen=True, slots=True)
class SidecarReceipt:
    """One finished unit and its file. `counts`: numbers about the rows, `tokens` and `truncated` of texts. `notes`: machine, versions."""

    unit: str
    attempt: str
    created: str  # UTC, ISO 8601
    fingerprint: str
    key: str
    index_key: str
    rows: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    counts: dict[str, int] = field(default_factory=dict)
    stats: dict[str, ChannelStats] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def precedence(self) -> tuple[str, str]:
        """Of several receipts of a unit or row, the lowest counts."""
        return self.created, self.attempt

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SidecarReceipt:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: not a receipt, or one of another format version.
        """
        raw: Any = json.loads(data)
        if (found := raw.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {found!r}, this Lathe reads {FORMAT_VERSION}")
        return cls(**{**raw, "stats": {name: ChannelStats.from_dict(one) for name, one in raw["stats"].items()}})


class SidecarReceipts:
    """Receipts of one set. Holds no state, so any number of runs may work on a set at a time."""

    def __init__(self, store: Store, name: str, failures: DrillConfig | None = None) -> None:
        """`failures`: where to fail on purpose, for tests."""
        self._store, self._name, self._drill = store, name, failures or DrillConfig()

    def commit(self, receipt: SidecarReceipt) -> SidecarReceipt:
        """Commits `receipt` unless its unit has one. Returns the receipt that counts; if its attempt is another, the caller deletes its
        files.
        """
        if not self._store.conditional_writes():
            return self._commit_by_name(receipt)
        key = receipt_key(self._name, receipt.unit)
        self._store.put_if_absent(key, receipt.to_json())
        drill.fire(self._drill, "before_read_back")
        # Read back in any case: some stores accept If-None-Match but do not decide a race with it.
        return self._load(key) or self._commit_by_name(receipt)

    def _commit_by_name(self, receipt: SidecarReceipt) -> SidecarReceipt:
        ours = receipt_key(self._name, receipt.unit, receipt.attempt)
        self._store.write(ours, receipt.to_json())
        drill.fire(self._drill, "before_read_back")
        if (winner := self.find(receipt.unit)) is None:
            raise BuildError(f"the receipt {ours} was written and is not listed by the store", stage="commit")
        if winner.attempt != receipt.attempt:
            self._store.delete(ours)  # before the caller deletes the files it names
        return winner

    def find(self, unit: str) -> SidecarReceipt | None:
        """The receipt that counts for a unit; None if it is not done.

        Raises:
            OutputError: a receipt of another format version.
        """
        listed = self._store.list(f"{receipts_prefix(self._name)}{unit}")
        return self._first([info.key for info in listed if unit_of_receipt(self._name, info.key) == unit])

    def all(self, without: Collection[str] = ()) -> list[SidecarReceipt]:
        """Receipts of all units but `without`, by (created, attempt).

        Raises:
            OutputError: a receipt of another format version.
        """
        by_unit: dict[str, list[str]] = {}
        for key in self._store.keys(receipts_prefix(self._name)):
            unit = unit_of_receipt(self._name, key)
            if unit is not None and unit not in without:
                by_unit.setdefault(unit, []).append(key)
        with ThreadPoolExecutor(WORKERS if is_remote(self._store.root) else 1, thread_name_prefix="receipts") as pool:
            found = [one for one in pool.map(self._first, by_unit.values()) if one is not None]
        return sorted(found, key=lambda one: one.precedence)

    def _first(self, keys: list[str]) -> SidecarReceipt | None:
        found = [one for key in keys if (one := self._load(key)) is not None]
        return min(found, key=lambda one: one.precedence, default=None)

    def _load(self, key: str) -> SidecarReceipt | None:
        try:
            data = self._store.read(key)
        except NotFound:  # listed, then deleted by an attempt that was second
            return None
        try:
            return SidecarReceipt.from_json(data)
        except (json.JSONDecodeError, UnicodeDecodeError):  # cut off
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{key} cannot be read as a receipt of sidecars: {error}", uri=self._store.uri(key)
            ) from None

"""What `lathe gc` may delete. Takes a store, retention, running builds and takedowns; returns a `GcPlan`. Writes nothing.

A stored file is looked at if no retained snapshot names it and it is older than the grace time. What its receipt says decides:

- no receipt names it: left by a killed or second attempt. Deleted, unless a build runs that began before the file was written.
- a receipt that the newest snapshot does not cover: kept, the next snapshot will name it.
- takedowns hide all its rows: deleted.
- `lathe compact` copied its rows: deleted.
- nothing of the receipt counts, because other versions of its inputs do: the receipt is moved to `_retired/`. A later gc, when it has been
  there for the grace time, deletes the files. Publishers that began before the move have ended then; those that begin after it do not see
  the receipt, and an input that goes back to that version is encoded again.
- anything else: kept.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.format.layout import DATA, DELTA_LOG, RETIRED, is_foreign_cache, retired_key, retired_receipt
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.records import Receipt
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.ledger.takedowns import Takedowns
    from pipeline.operate.gc_builds import Builds
    from pipeline.operate.retention import Retention
    from pipeline.storage import Store

WORKERS = 8  # threads on a remote store
REASONS = ("orphan", "taken_down", "compacted", "replaced")
"""Why a file is deleted."""


@dataclass(slots=True)
class StoredFile:
    """A data file and its index, those of the two that are there. Times by the store's clock."""

    objects: list[tuple[str, int]] = field(default_factory=list)  # key, bytes
    modified: float = 0.0  # of the younger one

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return sum(size for _, size in self.objects)


@dataclass(slots=True)
class GcPlan:
    """Files by the reason for which they go or stay, and receipts that move. Keys of objects."""

    doomed: dict[str, list[StoredFile]] = field(default_factory=lambda: defaultdict(list))  # by `REASONS`
    kept: Counter[str] = field(default_factory=Counter)  # files: young, pending, waiting, of_running_build, in_use
    waiting_bytes: int = 0  # of files that go when their receipts have been retired for the grace time
    retire: list[tuple[str, Receipt]] = field(default_factory=list)  # with its present key
    restore: list[tuple[str, Receipt]] = field(default_factory=list)  # retired ones that count again
    marks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by takedown: keys it has to list
    foreign: list[str] = field(default_factory=list)
    caches: int = 0  # objects that other readers wrote


def plan_files(
    store: Store, kept: Retention, builds: Builds, takedowns: Takedowns, *, now: float, grace_s: float
) -> GcPlan:
    """Decides on all data files and indexes.

    Raises:
        OutputError: a receipt, index or table that cannot be read, so that it is not known what it names.
    """
    return _Planner(store, kept, builds, takedowns, now, grace_s).plan()


class _Planner:
    def __init__(
        self, store: Store, kept: Retention, builds: Builds, takedowns: Takedowns, now: float, grace_s: float
    ) -> None:
        self._store, self._kept, self._builds, self._takedowns = store, kept, builds, takedowns
        self._limit = now - grace_s  # older objects are old enough
        self._ledger = Ledger(store)
        self._layout = self._ledger.layout
        self._workers = WORKERS if is_remote(store.root) else 1
        self._made = GcPlan()

    def plan(self) -> GcPlan:
        files = self._unnamed()
        shards = {stem.rpartition("/")[2][:16] for stem in files}
        live = [(key, found) for key, found in self._live(shards) if found is not None]
        retired = self._retired(shards)
        self._restore(retired)
        restored = {receipt.shard_id for _, receipt in self._made.restore}
        covered = self._covered({receipt.shard_id for _, receipt in live})
        alive = {(receipt.shard_id, receipt.attempt) for _, receipt in live}
        for _, receipt, modified in retired:
            if receipt.shard_id in restored or (receipt.shard_id, receipt.attempt) in alive:
                continue  # a gc that was killed had not moved it yet
            for stem in self._stems(receipt) & files.keys():
                file = files.pop(stem)
                if modified <= self._limit:
                    self._made.doomed["replaced"].append(file)
                else:
                    self._wait(file)
        for key, receipt in live:
            mine = {stem: files.pop(stem) for stem in sorted(self._stems(receipt)) if stem in files}
            self._decide(key, receipt, mine, covered)
        for file in files.values():
            running = self._builds.begun is not None and file.modified >= self._builds.begun
            if running:
                self._made.kept["of_running_build"] += 1
            else:
                self._made.doomed["orphan"].append(file)
        return self._made

    def _unnamed(self) -> dict[str, StoredFile]:
        """Files that no retained snapshot names and that are old enough, by stem. Counts the others."""
        found: dict[str, StoredFile] = {}
        for prefix in (DATA, self._layout.index):
            for info in self._store.list(prefix):
                if info.key in self._kept.named or info.key.startswith(DELTA_LOG):
                    continue
                stem = self._layout.file_stem(info.key)
                if stem is None:
                    if is_foreign_cache(info.key):
                        self._made.caches += 1
                    else:
                        self._made.foreign.append(info.key)
                    continue
                file = found.setdefault(stem, StoredFile())
                file.objects.append((info.key, info.size))
                file.modified = max(file.modified, info.modified)
        young = [stem for stem, file in found.items() if file.modified > self._limit]
        self._made.kept["young"] = len(young)
        for stem in young:
            del found[stem]
        return found

    def _live(self, shards: Collection[str]) -> list[tuple[str, Receipt | None]]:
        """Receipts, with their keys, of shards whose ids begin so."""
        names = ((key, self._layout.receipt_name(key)) for key in self._store.keys(self._layout.receipts))
        keys = [key for key, name in names if name is not None and name.shard_id[:16] in shards]
        return list(zip(keys, mapped_ahead(self._ledger.load, keys, self._workers, "receipts"), strict=True))

    def _retired(self, shards: Collection[str]) -> list[tuple[str, Receipt, float]]:
        """Retired receipts of these shards: key, receipt, when it was moved."""
        found = []
        for info in self._store.list(RETIRED):
            name = retired_receipt(info.key)
            if name is None:
                self._made.foreign.append(info.key)
            elif name.shard_id[:16] in shards and info.size:
                found.append((info.key, read_retired(self._store, info.key), info.modified))
        return found

    def _restore(self, retired: list[tuple[str, Receipt, float]]) -> None:
        """A retired receipt counts again if a publisher that had read it before shows it, or a build found its bytes unchanged."""
        if not retired:
            return
        wanted = {receipt.shard_id for _, receipt, _ in retired}
        named = self._same & wanted
        if self._kept.newest is not None:
            shards = pa.array(sorted(wanted), pa.string())
            for batch in Snapshots(self._store).batches(self._kept.newest, "files", ["shard_id"]):
                named.update(batch["shard_id"].filter(pc.is_in(batch["shard_id"], shards)).to_pylist())
        self._made.restore = [(key, receipt) for key, receipt, _ in retired if receipt.shard_id in named]

    @cached_property
    def _same(self) -> set[str]:
        """Shards that receipts name because an input has the bytes of their version."""
        with tempfile.TemporaryDirectory(prefix="lathe-gc-") as folder:
            path = Summaries(self._store, self._workers).spool(Path(folder) / "summaries")
            texts = read_table(path, ["same_as"])["same_as"].drop_null().to_pylist()
        return {shard for text in texts for shard in json.loads(text)}

    def _covered(self, shards: Collection[str]) -> dict[str, bool]:
        """Of these shards, those that the newest snapshot covers: whether anything of their receipts counts."""
        if self._kept.newest is None:
            return {}
        wanted, found = pa.array(sorted(shards), pa.string()), {}
        columns = ["shard_id", "own_shard", "clips"]
        for batch in Snapshots(self._store).batches(self._kept.newest, "receipts", columns):
            rows = batch.filter(pc.is_in(batch["shard_id"], wanted))
            for shard, own, clips in zip(*(rows[name].to_pylist() for name in columns), strict=True):
                found[shard] = own or clips > 0
        return found

    def _stems(self, receipt: Receipt) -> set[str]:
        return {stem for item in receipt.files if (stem := self._layout.file_stem(item.key)) is not None}

    def _decide(self, key: str, receipt: Receipt, files: dict[str, StoredFile], covered: dict[str, bool]) -> None:
        if not files:
            return
        made = self._made
        if receipt.shard_id not in covered:
            made.kept["pending"] += len(files)
        elif self._takedowns.hides_all(receipt):
            made.doomed["taken_down"] += files.values()
        elif not covered[receipt.shard_id] and self._may_retire(receipt):
            made.retire.append((key, receipt))
            for file in files.values():
                self._wait(file)
        else:
            for stem, file in files.items():
                self._decide_one(receipt, stem, file)

    def _decide_one(self, receipt: Receipt, stem: str, file: StoredFile) -> None:
        """A file of a receipt of which other files count."""
        if not self._takedowns.touches(receipt):
            self._made.kept["in_use"] += 1
            return
        (item,) = (item for item in receipt.files if self._layout.file_stem(item.key) == stem)
        if item.index_key not in self._takedowns.deleted:
            try:
                rows = stored_index(self._store, item.index_key)
            except NotFound:
                rows = []
            if not rows or not all(map(self._takedowns.hides, rows)):
                self._made.kept["in_use"] += 1
                return
            for record in self._takedowns.keys_naming(receipt):
                self._made.marks[record] += [item.key, item.index_key]
        self._made.doomed["taken_down"].append(file)

    def _may_retire(self, receipt: Receipt) -> bool:
        if receipt.shard_id in self._same or any(item.key in self._kept.named for item in receipt.files):
            return False
        retry = receipt.shard.retry  # one hidden sample of a retry may count again as long as its base does
        return retry is None or self._ledger.read(retry.base) is None

    def _wait(self, file: StoredFile) -> None:
        self._made.kept["waiting"] += 1
        self._made.waiting_bytes += file.num_bytes


def read_retired(store: Store, key: str) -> Receipt:
    """A receipt in `_retired/`.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        return Receipt.from_json(store.read(key))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"nothing was deleted: {key} cannot be read as a receipt: {error}", uri=store.uri(key)
        ) from None


def target_of(receipt: Receipt) -> str:
    """Where a receipt is moved when it retires."""
    return retired_key(receipt.shard_id, receipt.attempt)

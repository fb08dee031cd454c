"""What `lathe gc` may delete. Takes a store, retention, running builds and takedowns; returns a `GcPlan`. Writes nothing.

A stored file is looked at if no retained snapshot names it and it is older than the grace time. What its receipt says decides:

- no receipt names it: left by a killed or second attempt. Deleted, unless a build runs that began before the file was written.
- a receipt that the newest snapshot does not cover: kept, the next snapshot will name it.
- takedowns hide all its rows: deleted.
- `lathe compact` copied its rows: deleted.
- nothing of the receipt counts, because other versions of its inputs do, and no stored compacted file has rows of it: the receipt is moved
  to `_retired/`. A later gc, when it has been there for the grace time, deletes the files. Publishers that began before the move have
  ended then; those that begin after it do not see the receipt, and an input that goes back to that version is encoded again.
- anything else: kept.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.format.layout import COMPACTED, DATA, DELTA_LOG, RETIRED, is_foreign_cache, retired_key, retired_receipt
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger, read_retired, stored_index
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.operate.gc_restore import RetiredSearch
from pipeline.process.scratch import ScratchFolder
from pipeline.records import Receipt
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.format.layout import ReceiptName
    from pipeline.ledger.copies import Copies
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
    compacted: bool = False  # written by `lathe compact`; no receipt names it

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
        # Stored data files that `lathe compact` wrote and no retained snapshot names.
        self._unnamed_compacted: set[str] = set()

    @cached_property
    def _copies(self) -> Copies:
        return published_copies(self._store)

    @cached_property
    def _origins(self) -> set[str]:
        """Data files of receipts whose rows `lathe compact` copied into others."""
        return set(self._copies.table["origin"].to_pylist())

    def plan(self) -> GcPlan:
        """The plan."""
        files = self._unnamed()
        shards = {stem.rpartition("/")[2][:16] for stem in files} | {shard[:16] for shard in self._superseded()}
        names = self._receipts()
        retired = self._retired()
        restored = self._restored(names, retired)
        self._check_covered(names, retired, restored)
        live = [(key, found) for key, found in self._live(names, shards) if found is not None]
        wanted = {name: at for name, at in retired.items() if name.shard_id[:16] in shards and name not in restored}
        for _, receipt in self._made.restore:
            self._made.kept["in_use"] += sum(files.pop(stem, None) is not None for stem in self._stems(receipt))
        covered = self._covered({receipt.shard_id for _, receipt in live})
        alive = {(receipt.shard_id, receipt.attempt) for _, receipt in live}
        for name, modified in wanted.items():
            if (name.shard_id, name.attempt) in alive:
                continue  # a gc that was killed had not moved it yet
            receipt = read_retired(self._store, _key_of(name))
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
            if file.compacted:
                self._decide_compacted(file)
            elif self._builds.begun is not None and file.modified >= self._builds.begun:
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
                file = found.setdefault(stem, StoredFile(compacted=f"-{COMPACTED}" in stem))
                if file.compacted and prefix == DATA:
                    self._unnamed_compacted.add(info.key)
                file.objects.append((info.key, info.size))
                file.modified = max(file.modified, info.modified)
        young = [stem for stem, file in found.items() if file.modified > self._limit]
        self._made.kept["young"] = len(young)
        for stem in young:
            del found[stem]
        return found

    def _receipts(self) -> dict[str, ReceiptName]:
        """Names of all receipts, by key."""
        names = ((key, self._layout.receipt_name(key)) for key in self._store.keys(self._layout.receipts))
        return {key: name for key, name in names if name is not None}

    def _check_covered(
        self, names: dict[str, ReceiptName], retired: Collection[ReceiptName], restored: Collection[ReceiptName]
    ) -> None:
        """Where receipts are gone that the newest snapshot covers, others may be, too, and their files would look like orphans.

        A retired receipt stands for its shard only if no row of the shard counts: it may be that of an earlier attempt.

        Raises:
            OutputError: some are gone.
        """
        newest = self._kept.newest
        if newest is None:
            return
        there = pa.array(sorted({name.shard_id for name in (*names.values(), *restored)}), pa.string())
        moved = pa.array(sorted({name.shard_id for name in retired}), pa.string())
        lost: list[str] = []
        for batch in Snapshots(self._store).batches(newest, "receipts", ["shard_id", "clips"]):
            gone_on_purpose = pc.and_(pc.is_in(batch["shard_id"], moved), pc.equal(batch["clips"], 0))
            known = pc.or_(pc.is_in(batch["shard_id"], there), gone_on_purpose)
            lost += batch["shard_id"].filter(pc.invert(known)).to_pylist()
        if lost:
            key = self._layout.receipt_key(lost[0])
            raise OutputError(
                f"nothing was deleted: {len(lost)} receipts that snapshot {newest.number} covers are gone, such as {key}, so that files "
                f"may be needed which no receipt names any more; restore them, or run `lathe publish {self._store.root}`",
                uri=self._store.uri(key),
            )

    def _live(self, names: dict[str, ReceiptName], shards: Collection[str]) -> list[tuple[str, Receipt | None]]:
        """Receipts, with their keys, of shards whose ids begin so."""
        keys = [key for key, name in names.items() if name.shard_id[:16] in shards]
        return list(zip(keys, mapped_ahead(self._ledger.load, keys, self._workers, "receipts"), strict=True))

    def _retired(self) -> dict[ReceiptName, float]:
        """Retired receipts, and when each was moved."""
        found = {}
        for info in self._store.list(RETIRED):
            name = retired_receipt(info.key)
            if name is None:
                self._made.foreign.append(info.key)
            elif info.size:
                found[name] = info.modified
        return found

    def _restored(self, names: dict[str, ReceiptName], retired: Collection[ReceiptName]) -> set[ReceiptName]:
        """Retired receipts that move back, see `gc_restore`."""
        if not retired:
            return set()
        search = RetiredSearch(self._store, self._kept.newest, self._copies, self._takedowns)
        asked = search.asked({name.shard_id for name in retired}, self._same)
        if asked:
            live = self._live(names, {shard[:16] for shard in asked})
            asked -= {receipt.shard_id for _, receipt in live if receipt is not None}  # encoded again
        read = {name: read_retired(self._store, _key_of(name)) for name in retired if name.shard_id in asked}
        found = search.found(read, self._same)
        self._made.restore = [(_key_of(name), read[name]) for name in sorted(found, key=_key_of)]
        return found

    @cached_property
    def _same(self) -> set[str]:
        """Shards that receipts name because an input has the bytes of their version."""
        with ScratchFolder() as folder:
            path = Summaries(self._store, self._workers).spool(folder / "summaries")
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

    def _superseded(self) -> set[str]:
        """Shards nothing of whose receipts counts and whose rows `lathe compact` copied or dropped: their own files may be gone."""
        found: set[str] = set()
        if self._kept.newest is None or not self._copies:
            return found
        columns = ["shard_id", "own_shard", "clips"]
        for batch in Snapshots(self._store).batches(self._kept.newest, "receipts", columns):
            nothing = pc.and_(pc.invert(batch["own_shard"]), pc.equal(batch["clips"], 0))
            mine = pc.and_(nothing, pc.is_in(batch["shard_id"], self._copies.shards))
            found.update(batch["shard_id"].filter(mine).to_pylist())
        return found

    def _stems(self, receipt: Receipt) -> set[str]:
        return {stem for item in receipt.files if (stem := self._layout.file_stem(item.key)) is not None}

    def _decide(self, key: str, receipt: Receipt, files: dict[str, StoredFile], covered: dict[str, bool]) -> None:
        made, copied = self._made, bool(self._copies.of(receipt.shard_id))
        if not files and (not copied or covered.get(receipt.shard_id, True)):
            return
        if receipt.shard_id not in covered:
            made.kept["pending"] += len(files)
        elif self._takedowns.hides_all(receipt):
            made.doomed["taken_down"] += files.values()
        elif not covered[receipt.shard_id] and self._may_retire(receipt):
            made.retire.append((key, receipt))
            for file in files.values():
                self._wait(file)
        else:
            for item in receipt.files:
                found = files.get(self._layout.file_stem(item.key) or "")
                if found is not None and item.key in self._origins:
                    made.doomed["compacted"].append(found)
                elif found is not None:
                    self._decide_one(item.key, item.index_key, found, self._takedowns.touches(receipt))

    def _decide_compacted(self, file: StoredFile) -> None:
        key = next((key for key, _ in file.objects if key.startswith(DATA)), "")
        facts = self._copies.files.get(key)
        if facts is None:  # of a compaction that was killed or was second, or rewritten by another
            self._made.doomed["compacted"].append(file)
        else:
            self._decide_one(key, facts["index_key"], file, bool(self._takedowns))

    def _decide_one(self, key: str, index_key: str, file: StoredFile, touched: bool) -> None:
        """A file whose receipt counts, and of which the newest snapshot shows no row."""
        if touched and index_key not in self._takedowns.deleted:
            try:
                rows = stored_index(self._store, index_key)
            except NotFound:
                rows = []
            touched = bool(rows) and all(map(self._takedowns.hides, rows))
            if touched:
                for record in self._takedowns.keys_for([uri_id(row.source_uri) for row in rows]):
                    self._made.marks[record] += [key, index_key]
        if touched:
            self._made.doomed["taken_down"].append(file)
        else:
            self._made.kept["in_use"] += 1

    def _may_retire(self, receipt: Receipt) -> bool:
        if receipt.shard_id in self._same or any(item.key in self._kept.named for item in receipt.files):
            return False
        if receipt.shard_id in self._copied:  # readers of that file find takedowns of its rows by the receipt
            return False
        retry = receipt.shard.retry  # one hidden sample of a retry may count again as long as its base does
        return retry is None or self._ledger.read(retry.base) is None

    @cached_property
    def _copied(self) -> set[str]:
        """Shards that have rows in a stored compacted file, as any retained snapshot knows them."""
        found: set[str] = set()
        stored: dict[str, bool] = {}  # by the text of the file
        read: set[str] = set()  # hashes of tables: most snapshots hand on that of their parent
        snapshots = Snapshots(self._store)
        for number in self._kept.retained:
            try:
                snapshot = snapshots.read(number)
                table = snapshot.tables.get("copies")
                if table is None or table.sha256 in read:
                    continue
                read.add(table.sha256)
                for batch in snapshots.batches(snapshot, "copies", ["shard_id", "file", "rows"]):
                    mine = batch.filter(pc.greater(batch["rows"], 0))
                    for shard, text in zip(mine["shard_id"].to_pylist(), mine["file"].to_pylist(), strict=True):
                        if text not in stored:
                            key = json.loads(text)["key"]
                            stored[text] = key in self._kept.named or key in self._unnamed_compacted
                        if stored[text]:
                            found.add(shard)
            except OutputError:
                if self._kept.newest is None or number not in self._kept.newest.passed_over:
                    raise
        return found

    def _wait(self, file: StoredFile) -> None:
        self._made.kept["waiting"] += 1
        self._made.waiting_bytes += file.num_bytes


def _key_of(name: ReceiptName) -> str:
    return retired_key(name.shard_id, str(name.attempt))

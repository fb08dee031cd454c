"""Garbage collection of an output (`lathe gc`): deletes what nothing needs. Takes a store and `GcOptions`, returns a JSON-ready dict.

The order makes a kill harmless: receipts that retire, records of snapshots, the Delta log, tables of snapshots, data files, names in
takedowns, leftovers. No snapshot names an object that is deleted before its record. A later gc goes on where one was killed.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import DrillConfig
from pipeline.errors import AccessError, OutputError
from pipeline.format.layout import (
    LEASES,
    NIGHTS,
    OWN_FOLDERS,
    SNAPSHOTS,
    TAKEDOWNS,
    is_snapshot_table,
    night_of_report,
    reported_snapshot,
    retired_key,
    snapshot_key,
    snapshot_number,
)
from pipeline.ledger.lease import MAINTENANCE, Lease
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import Ledger, read_retired, retired_keys
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedowns import NONE, Takedowns, listed_takedowns, read_record, read_takedowns
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.gc_builds import SILENT_S, look_at_builds, store_clock
from pipeline.operate.gc_plan import REASONS, plan_files
from pipeline.operate.hugging_face import name_data_files
from pipeline.operate.retention import DAY_S, retention
from pipeline.operate.taken_files import TakenFiles
from pipeline.process import kill_points as drill
from pipeline.storage import PROBE, is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from pipeline.operate.gc_plan import GcPlan, StoredFile
    from pipeline.operate.retention import Retention
    from pipeline.records import Receipt
    from pipeline.storage import Leftover, ObjectInfo, Store

Item = TypeVar("Item")

WORKERS = 16  # threads that read, move and delete, on a remote store
BATCH = 1000  # objects between two looks at the lease
SHOWN = 20  # keys that are listed; the rest is counted


@dataclass(frozen=True, slots=True)
class GcOptions:
    """What may go. See `GcConfig`."""

    grace_s: float = 48 * 3600.0
    keep_snapshots: int = 30
    keep_days: float = 30.0  # of snapshots, run logs and reports of nights
    forget: bool = False  # also what is younger and holds or names what was taken down: older snapshots, run logs
    ended: tuple[str, ...] = ()  # builds that the user says have ended
    dry_run: bool = False


def collect(store: Store, options: GcOptions | None = None, *, failures: DrillConfig | None = None) -> dict[str, Any]:
    """Deletes what no retained snapshot, no receipt that counts and no running build names, and what is older than the grace time.

    Returns `snapshots` (numbers: `retained`, `retired`, `forgotten`), `deleted` (files and bytes by reason, other objects), `kept` (files
    by reason), `waiting` (files and bytes of receipts that retired less than the grace time ago), `receipts` (`retired`, `restored`),
    `takedowns` (`names_removed`, `stored`: records whose bytes are still there, with the snapshots that name them), `foreign`, `notices`.
    With `dry_run` nothing is written, not even a scratch object.

    Raises:
        LeaseHeld: another gc, a compaction or an undo runs.
        OutputError: the store's clock is off, a build may run that cannot be seen, or something cannot be read. Nothing was deleted.
    """
    options = options or GcOptions()
    Ledger(store).latent_set()
    if options.dry_run:
        return _Collection(store, options, None, failures).run()
    with Lease(store, MAINTENANCE, "lathe gc") as lease:
        return _Collection(store, options, lease, failures).run()


class _Collection:
    """One run. `lease`: None in a dry run."""

    def __init__(self, store: Store, options: GcOptions, lease: Lease | None, failures: DrillConfig | None) -> None:
        self._store, self._options, self._lease = store, options, lease
        self._drill = failures or DrillConfig()
        self._layout = Ledger(store).layout
        self._workers = WORKERS if is_remote(store.root) else 1
        self._conditional = lease is not None and store.conditional_writes()
        self._now = datetime.now(UTC).timestamp() if lease is None else store_clock(store)
        self._limit = self._now - options.grace_s
        self._notices: list[str] = []

    def run(self) -> dict[str, Any]:
        """Plans, then deletes."""
        store, options = self._store, self._options
        builds = look_at_builds(store, self._layout.progress, self._now, options.grace_s, options.ended)
        takedowns = read_takedowns(store)
        kept = retention(
            store,
            self._now,
            keep_snapshots=options.keep_snapshots,
            keep_days=options.keep_days,
            forget=takedowns if options.forget else NONE,
        )
        self._notices += [f"--ended {name}: there is no heartbeat of a build of this name" for name in builds.unknown]
        self._notices += kept.damaged
        plan = plan_files(store, kept, builds, takedowns, now=self._now, grace_s=options.grace_s)
        tables = list(self._tables(kept))
        leftovers, scratch = list(self._leftovers(builds.begun)), list(self._scratch())
        scratch += [info for info in builds.ended if info not in scratch]
        runs = list(self._runs(builds.running, takedowns))
        if self._lease is not None:
            log = DeltaLog(store)
            log.check()  # before anything is deleted that it may name
            self._move_receipts(plan)
            self._delete([snapshot_key(number) for number in kept.retired], after="after_first_record")
            self._delete(info.key for info in kept.empty if info.modified <= self._limit)
            drill.fire(self._drill, "after_records")
            log.refresh()
            self._delete(info.key for info in tables)
            self._mark(plan)
            drill.fire(self._drill, "before_data")
            self._delete((key for file in _files(plan) for key, _ in file.objects), after="after_first_file")
            if kept.newest is not None and "copies" in kept.newest.tables:  # else its list is a glob
                name_data_files(store)
            self._delete(info.key for info in (*runs, *scratch))
            self._each(store.discard, leftovers)
        gone = set() if self._lease is not None else {key for file in _files(plan) for key, _ in file.objects}
        removed, stored = self._names(kept, gone)
        return {
            "output": store.root,
            "dry_run": options.dry_run,
            "snapshots": {name: getattr(kept, name) for name in ("retained", "retired", "forgotten")},
            "deleted": {
                **{reason: _sums(plan.doomed[reason]) for reason in REASONS},
                "tables": _sizes(tables),
                "runs": _sizes(runs),
                "heartbeats": len(builds.ended),
                "scratch": len(scratch) - len(builds.ended),
                "leftovers": {"files": len(leftovers), "bytes": sum(item.size for item in leftovers)},
            },
            "names": [key for file in _files(plan) for key, _ in file.objects][:SHOWN],
            "kept": dict(plan.kept),
            "waiting": {"files": plan.kept["waiting"], "bytes": plan.waiting_bytes},
            "receipts": {"retired": len(plan.retire), "restored": len(plan.restore)},
            "running": builds.running,
            "takedowns": {"names_removed": removed, "stored": stored},
            "foreign": {"objects": len(plan.foreign), "names": plan.foreign[:SHOWN], "caches": plan.caches},
            "notices": self._notices,
        }

    # --- what lies around ---------------------------------------------------------------------------------------------

    def _tables(self, kept: Retention) -> Iterator[ObjectInfo]:
        """Pages of retired snapshots, and those older than a takedown.

        Tables that no retained snapshot names: of retired ones, and of publishers that were killed or second. Those of the next snapshot
        stay for an hour at least, whatever the grace time: a publisher that runs may be about to name them.
        """
        retired = set(kept.retired)
        newest = 0 if kept.newest is None else kept.newest.number
        taken = max((info.modified for info in self._store.list(TAKEDOWNS)), default=0.0)
        for info in self._store.list(SNAPSHOTS):
            if (reported := reported_snapshot(info.key)) is not None:
                gone = reported not in kept.retained and info.modified <= self._limit
                if reported in retired or gone or info.modified <= taken:  # names and pictures of what was taken down
                    yield info
                continue
            if info.key in kept.named or not is_snapshot_table(info.key):
                continue
            number = snapshot_number(f"{info.key.rpartition('/')[0]}.json") or 0
            limit = self._limit if number <= newest else min(self._limit, self._now - SILENT_S)
            if number in retired or info.modified <= limit:
                yield info

    def _scratch(self) -> Iterator[ObjectInfo]:
        """Objects that were written to try the store out or to read its clock, by processes that were killed before they deleted them."""
        for info in self._store.list("", recursive=False):
            if info.key.startswith(PROBE) and info.modified <= self._limit:
                yield info
        for info in self._store.list(LEASES):
            if info.key.endswith(".time") and info.modified <= self._limit:
                yield info

    def _runs(self, running: Collection[str], takedowns: Takedowns) -> Iterator[ObjectInfo]:
        """Run logs and reports of nights, which name inputs: those that ended `keep_days` ago. With `forget` and a takedown, all that are
        older than the grace time.
        """
        options, limit = self._options, self._limit
        if not (options.forget and takedowns):
            limit = min(limit, self._now - options.keep_days * DAY_S)
        found: dict[str, list[ObjectInfo]] = defaultdict(list)
        for prefix in {self._layout.runs, NIGHTS}:
            for info in self._store.list(prefix):
                part = self._layout.run_log_name(info.key)
                if (name := part[0] if part is not None else night_of_report(info.key)) is not None:
                    found[name].append(info)
        for name, parts in found.items():
            if name not in running and max(part.modified for part in parts) <= limit:
                yield from parts

    def _leftovers(self, begun: float | None) -> Iterator[Leftover]:
        """Writes that were begun before the grace time and never finished: hidden files, multipart uploads. `begun`: of running builds."""
        limit = self._limit if begun is None else min(self._limit, begun)
        for prefix in ("", *OWN_FOLDERS):
            try:
                for item in self._store.leftovers(prefix, recursive=bool(prefix)):
                    if item.modified <= limit and (item.upload is None or self._is_own(item.key)):
                        yield item
            except AccessError as error:  # a right of its own on S3, and not every server has it
                self._notices.append(f"unfinished uploads were not looked for: {error}")
                return

    def _is_own(self, key: str) -> bool:
        """Whether Lathe uploads objects of this name."""
        layout = self._layout
        return layout.file_stem(key) is not None or layout.is_summary(key) or is_snapshot_table(key)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _move_receipts(self, plan: GcPlan) -> None:
        """Retires receipts and takes retired ones back. Each is copied, then deleted: a kill leaves both, and the first counts."""
        self._each(self._restore, plan.restore)
        self._each(self._retire, plan.retire)

    def _restore(self, item: tuple[str, Receipt]) -> None:
        key, receipt = item
        data, shard = receipt.to_json(), receipt.shard_id
        # If the shard was encoded again meanwhile, its receipt stays beside this one; the earlier counts.
        if not self._conditional or not self._store.put_if_absent(self._layout.receipt_key(shard), data):
            self._store.write(self._layout.receipt_key(shard, receipt.attempt), data)
        self._store.delete(key)

    def _retire(self, item: tuple[str, Receipt]) -> None:
        key, receipt = item
        self._store.write(retired_key(receipt.shard_id, receipt.attempt), self._store.read(key))
        drill.fire(self._drill, "in_retiring")
        self._store.delete(key)

    def _mark(self, plan: GcPlan) -> None:
        """Names files in the records that hide all their rows, before they are deleted: readers need not find them."""
        for key, files in plan.marks.items():
            record = read_record(self._store, key)
            every = sorted({*record.deleted, *files})
            self._store.write(key, replace(record, deleted=tuple(every)).to_json())

    def _delete(self, keys: Iterable[str], after: str | None = None) -> None:
        """Deletes objects. `after`: kill point when the first is gone."""
        rest = iter(keys)
        if after is not None:
            for key in itertools.islice(rest, 1):
                self._each(self._store.delete, [key])
                drill.fire(self._drill, after)
        self._each(self._store.delete, rest)

    def _each(self, do: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Calls `do` with each item, in threads on a remote store, while the lease is held."""
        rest = iter(items)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="gc") as pool:
            while batch := list(itertools.islice(rest, BATCH)):
                if self._lease is not None:
                    self._lease.check()
                list(pool.map(do, batch))

    # --- names in takedowns -------------------------------------------------------------------------------------------

    def _names(self, kept: Retention, gone: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
        """Replaces names by hashes in records older than the grace time no row of which is stored any more. Also returns records of which
        some are, with what names their files. `gone`: files that a dry run would delete.
        """
        listed, undone = listed_takedowns(self._store)
        read = mapped_ahead(
            partial(read_record, self._store), [key for key in listed if key not in undone], self._workers, "takedowns"
        )
        old = [
            record
            for record in read
            if record.names_removed is None and datetime.fromisoformat(record.created).timestamp() <= self._limit
        ]
        takedowns = Takedowns(old)
        left, snapshots = self._still_there(takedowns, kept, gone)
        retired = self._in_retired(takedowns)
        removed, stored = [], []
        for record in old:
            key = record.key
            if key in left or key in snapshots or key in retired:
                stored.append({"record": key, "files": left[key], "snapshots": snapshots.get(key, [])})
                continue
            removed.append(key)
            if self._lease is not None:
                self._lease.check()
                when = datetime.now(UTC).isoformat(timespec="seconds")
                self._store.write(key, record.without_names(when).to_json())
        return removed, stored

    def _still_there(
        self, takedowns: Takedowns, kept: Retention, gone: set[str]
    ) -> tuple[Counter[str], dict[str, list[int]]]:
        """By record: number of stored files with rows that it hides, and snapshots that name such files."""
        if not takedowns:
            return Counter(), {}
        files = TakenFiles(self._store, takedowns)
        left = Counter(key for file in files.stored() if file.key not in gone for key in file.records)
        snapshots: dict[str, list[int]] = {}
        for number in kept.retained:
            try:
                named = {key for file, _ in files.of_snapshot(number) for key in file.records}
            except OutputError:  # one of `kept.damaged`: nothing can be read by it
                continue
            for key in sorted(named):
                snapshots.setdefault(key, []).append(number)
        return left, snapshots

    def _in_retired(self, takedowns: Takedowns) -> set[str]:
        """Records that name a source of a retired receipt of which a file is there."""
        if not takedowns:
            return set()
        found: set[str] = set()
        keys = retired_keys(self._store)
        for receipt in mapped_ahead(partial(read_retired, self._store), keys, self._workers, "retired"):
            named = takedowns.keys_for([uri_id(source.uri) for source in receipt.shard.objects])
            if not found.issuperset(named) and any(self._store.exists(item.key) for item in receipt.files):
                found.update(named)
        return found


def _files(plan: GcPlan) -> Iterator[StoredFile]:
    return (file for reason in REASONS for file in plan.doomed[reason])


def _sums(files: list[StoredFile]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(file.num_bytes for file in files)}


def _sizes(infos: list[ObjectInfo]) -> dict[str, int]:
    return {"files": len(infos), "bytes": sum(info.size for info in infos)}

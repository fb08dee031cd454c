"""Writer of consecutive versions of the Delta log, each the difference between two snapshots.

Takes what each version is made from (`Origin`) and the takedowns. A version that adds many files has their statistics in a checkpoint,
in a tenth of the space.
"""

from __future__ import annotations

import operator
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from pipeline.errors import NotFound, OutputError
from pipeline.format.layout import DATA, DELTA_LOG
from pipeline.ledger.manifest import release_memory
from pipeline.ledger.receipts import stored_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate import delta_actions as actions
from pipeline.operate.delta_actions import DataFile
from pipeline.operate.delta_contents import LAST_CHECKPOINT, WORKERS, checkpoint_key, version_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.operate.delta_contents import LogContents, Origin
    from pipeline.storage import Store

MANY = 2000  # files that a version adds, from which on it has a checkpoint
COLUMNS = ["key", "bucket", "rows", "bytes", "ranges", "hidden", "index_key"]


@dataclass(slots=True)
class _Contents:
    """Files of one version by path below `data/`, and what of its snapshot is left out."""

    files: dict[str, DataFile] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, kind: str, rows: int) -> None:
        for name, count in ((f"{kind}_files", 1), (f"{kind}_rows", rows)):
            self.left_out[name] = self.left_out.get(name, 0) + count


class LogWriter:
    """Writer of one pass: snapshots and takedowns are those of its start."""

    def __init__(self, store: Store, origins: dict[int, Origin], takedowns: Takedowns) -> None:
        self._store, self._origins = store, origins
        self._snapshots = Snapshots(store)
        self._numbers = [version for version, origin in origins.items() if origin.record]
        self._taken = _TakenFiles(store, takedowns)
        self._first = self._snapshots.read(self._numbers[0])
        self._paired = self._paired_columns()
        self._start = min(origins)  # above 0: earlier snapshots are deleted
        self._replace = False

    def _paired_columns(self) -> dict[int, frozenset[str]]:
        """By version with a snapshot: paired videos of it and of those before it. A column that a version has stays in later ones."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="delta") as pool:
            found = pool.map(lambda number: actions.paired_columns(self._snapshots.read(number)), self._numbers)
            return dict(zip(self._numbers, accumulate(found, operator.or_), strict=True))

    def _metadata(self, version: int) -> dict[str, Any]:
        return actions.metadata(self._first, self._paired[version])

    def write(self, first: int, outdated: LogContents | None = None) -> None:
        """Writes all versions from `first` to the newest: where there is none, or over those of an outdated log.

        Another publisher may do the same at the same time: what it wrote is left, and the next pass compares.
        """
        self._replace = outdated is not None
        if outdated is not None:
            self._clear(outdated)
        newest = self._snapshots.read(self._numbers[-1])
        if self._taken.may_learn(newest):
            self._taken.learn(self._snapshots.table(newest, "files", ["key", "hidden"]))
        before = self._contents(max((number for number in self._numbers if number < first), default=None))
        for version in range(max(first, 1), max(self._origins) + 1):
            if self._origins[version].record:
                found = self._contents(version, before)
                self._commit(version, found, before)
                before = found
            else:  # number of a killed publisher: nothing changes
                self._put(version, {}, None, ())
        if first == 0:  # written last: without it, readers see no table
            self._put(0, {}, None, ({"protocol": actions.PROTOCOL}, {"metaData": self._metadata(self._numbers[0])}))
        for version in sorted(outdated.heads if outdated is not None else ()):
            if version < self._start:  # only now, when the checkpoint of the first version that stays is there
                self._store.delete(version_key(version))

    def _clear(self, log: LogContents) -> None:
        """Deletes outdated checkpoints, the pointer to the last one first, and versions without a snapshot.

        A checkpoint that is current may be of another publisher that does the same now.
        """
        outdated = [n for n, origin in log.checkpoints.items() if origin != self._origins.get(n)]
        if log.last_checkpoint is not None and log.last_checkpoint[0] in outdated:
            self._store.delete(DELTA_LOG + LAST_CHECKPOINT)
        for version in outdated:
            self._store.delete(checkpoint_key(version))
        for version in sorted(set(log.heads) - set(self._origins), reverse=True):
            if version > self._start:
                self._store.delete(version_key(version))

    def _contents(self, number: int | None, before: _Contents | None = None) -> _Contents:
        """Contents of a snapshot. What is equal in `before` is shared with it: 300 bytes a file."""
        found, known = _Contents(), {} if before is None else before.files
        if number is None:
            return found
        snapshot = self._snapshots.read(number)
        for batch in self._snapshots.batches(snapshot, "files", COLUMNS):
            rows = batch.to_pylist()
            parquet = [row for row in rows if row["key"].endswith(".parquet")]
            taken = self._taken.among(row for row in parquet if not row["hidden"])
            for row in rows:
                if not row["key"].endswith(".parquet"):
                    found.leave_out("tar", row["rows"])
                elif row["hidden"] or row["key"] in taken:
                    found.leave_out("hidden", row["rows"])
                else:
                    path = sys.intern(row["key"].removeprefix(DATA))
                    file = DataFile(sys.intern(row["bucket"]), row["rows"], row["bytes"], row["ranges"])
                    found.files[path] = known[path] if known.get(path) == file else file
        release_memory()
        return found

    def _commit(self, version: int, found: _Contents, before: _Contents) -> None:
        snapshot = self._snapshots.read(version)
        when = actions.milliseconds(snapshot.created)
        added = [path for path in sorted(found.files) if path not in before.files]
        removed = [path for path in sorted(before.files) if path not in found.files]
        many = len(added) > MANY or version == self._start
        facts = {
            "snapshot": version,
            "fingerprints": sorted(snapshot.fingerprints),
            "leftOut": found.left_out,
            "checkpoint": many,
        }
        # A compaction changes no row, unless rows that were left out, of files with hidden rows, come in.
        rows = [
            sum(contents.files[path].rows for path in paths) for contents, paths in ((found, added), (before, removed))
        ]
        changes = "compaction" not in snapshot.lineage or rows[0] != rows[1]
        removes = ({"remove": actions.remove(path, before.files[path], when, changes=changes)} for path in removed)
        adds = ({"add": actions.add(path, found.files[path], when, brief=many, changes=changes)} for path in added)
        self._put(version, facts, when, chain(self._new_columns(version), removes, adds))
        if many:
            release_memory()
            every = (actions.add(path, found.files[path], when, brief=False) for path in sorted(found.files))
            origin = self._origins[version]._asdict()
            self._store.write(checkpoint_key(version), actions.checkpoint(origin, self._metadata(version), every))
            self._store.write(DELTA_LOG + LAST_CHECKPOINT, actions.last_checkpoint(version, len(found.files), origin))

    def _new_columns(self, version: int) -> list[dict[str, Any]]:
        """The action `metaData` if the version has columns that the one before lacks. The first version has them from its start."""
        before = max((number for number in self._numbers if number < version), default=version)
        return [] if self._paired[version] == self._paired[before] else [{"metaData": self._metadata(version)}]

    def _put(self, version: int, facts: dict[str, Any], when: int | None, lines: Iterable[dict[str, Any]]) -> None:
        key = version_key(version)
        data = actions.version_bytes({**self._origins[version]._asdict(), **facts}, when, lines)
        if self._replace:
            self._store.write(key, data)
        else:
            self._store.put_if_absent(key, data)


class _TakenFiles:
    """Data files that hold a row that a takedown hides. Indexes are read only of files about which snapshots say nothing."""

    def __init__(self, store: Store, takedowns: Takedowns) -> None:
        self._store, self._takedowns = store, takedowns
        self._known: dict[str, bool] = {}

    def may_learn(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot applied all takedowns, so that its files of which it hides no row need not be read."""
        return bool(self._takedowns) and {item.key for item in self._takedowns.records} <= set(snapshot.takedowns)

    def learn(self, files: pa.Table) -> None:
        """Takes the files of such a snapshot."""
        whole = files["key"].filter(pc.equal(pc.list_value_length(files["hidden"]), 0))
        self._known.update(dict.fromkeys(whole.to_pylist(), False))

    def among(self, rows: Iterable[dict[str, Any]]) -> set[str]:
        """Keys of those of these files, rows of a manifest, that hold a hidden row."""
        if not self._takedowns:
            return set()
        keys = {row["key"]: row["index_key"] for row in rows}
        unknown = {key: index for key, index in keys.items() if key not in self._known}
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="delta") as pool:
            self._known.update(zip(unknown, pool.map(self._holds_hidden, unknown.values()), strict=True))
        return {key for key in keys if self._known[key]}

    def _holds_hidden(self, index_key: str) -> bool:
        """Whether a row is taken down. A file whose index is lost or damaged leaves the view: it may hold such a row."""
        try:
            return any(map(self._takedowns.hides, stored_index(self._store, index_key)))
        except (NotFound, OutputError):
            return True

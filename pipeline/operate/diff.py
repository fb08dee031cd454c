"""Differences between two snapshots: counts, files, rows and sources.

Takes two snapshots, returns a JSON-ready dict. Only indexes of files that are in one snapshot, or have other hidden rows, are read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.format.index import read_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns

if TYPE_CHECKING:
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class _Side:
    """One snapshot with its list of files."""

    store: Store
    snapshot: Snapshot
    files: dict[str, tuple[str, tuple[int, ...]]]  # by key: index key, positions of hidden rows

    def rows(self, keys: list[str], workers: int) -> dict[str, str]:
        """Source URIs of visible rows in these files, by row id."""
        takedowns = read_takedowns(self.store)

        def read(key: str) -> dict[str, str]:
            index_key, hidden = self.files[key]
            rows, _ = read_index(self.store.read(index_key))
            left_out = set(hidden)
            return {row.id: row.source_uri for row in rows if row.row not in left_out and not takedowns.hides(row)}

        found: dict[str, str] = {}
        with ThreadPoolExecutor(workers, thread_name_prefix="diff") as pool:
            for part in pool.map(read, keys):
                found.update(part)
        return found


def diff(a: tuple[Store, int | None], b: tuple[Store, int | None], workers: int = 8) -> dict[str, Any]:
    """Differences by kind: only in `b` ("added"), only in `a` ("dropped"); sources in both with other rows are "replaced".

    Raises:
        InputError: no such snapshot.
        OutputError: a snapshot or index that cannot be read.
    """
    one, two = _open(*a), _open(*b)
    added = sorted(set(two.files) - set(one.files))
    dropped = sorted(set(one.files) - set(two.files))
    changed = sorted(key for key in set(one.files) & set(two.files) if one.files[key] != two.files[key])
    before, after = one.rows(dropped + changed, workers), two.rows(added + changed, workers)
    gone = {name: uri for name, uri in before.items() if name not in after}
    new = {name: uri for name, uri in after.items() if name not in before}
    replaced = sorted(set(gone.values()) & set(new.values()))
    return {
        "a": _facts(one),
        "b": _facts(two),
        "counts": _differences(one.snapshot.counts, two.snapshot.counts),
        "rejects": _differences(one.snapshot.rejects, two.snapshot.rejects),
        "buckets": _differences(_rows_by_bucket(one.snapshot), _rows_by_bucket(two.snapshot)),
        "fingerprints": {
            "added": sorted(set(two.snapshot.fingerprints) - set(one.snapshot.fingerprints)),
            "dropped": sorted(set(one.snapshot.fingerprints) - set(two.snapshot.fingerprints)),
        },
        "files": {"added": added, "dropped": dropped, "changed": changed},
        "rows": {"added": len(new), "dropped": len(gone)},
        "sources": {
            "added": sorted(set(new.values()) - set(replaced)),
            "replaced": replaced,
            "dropped": sorted(set(gone.values()) - set(replaced)),
        },
    }


def _open(store: Store, number: int | None) -> _Side:
    snapshots = Snapshots(store)
    snapshot = snapshots.get(number)
    columns = snapshots.table(snapshot, "files", ["key", "index_key", "hidden"]).to_pydict()
    files = {
        key: (index_key, tuple(hidden))
        for key, index_key, hidden in zip(columns["key"], columns["index_key"], columns["hidden"], strict=True)
    }
    return _Side(store, snapshot, files)


def _facts(side: _Side) -> dict[str, Any]:
    return {
        "output": side.store.root,
        "snapshot": side.snapshot.number,
        "created": side.snapshot.created,
        **side.snapshot.counts,
    }


def _differences(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Non-zero differences by name."""
    names = sorted(set(before) | set(after))
    return {name: n for name in names if (n := after.get(name, 0) - before.get(name, 0))}


def _rows_by_bucket(snapshot: Snapshot) -> dict[str, int]:
    return {name: bucket["rows"] for name, bucket in snapshot.buckets.items()}

"""Differences between two snapshots: counts, files, rows and sources.

Takes two snapshots, returns a JSON-ready dict. Only indexes of files that are in one snapshot, or have other hidden rows, are read; all if
there are several fingerprints or retries, because then a source with new rows may have others in a file that did not change.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute as pc

from pipeline.errors import InputError, NotFound, OutputError
from pipeline.format.index import read_index
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.takedowns import may_be_deleted, read_takedowns

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.storage import Store


class _Row(NamedTuple):
    """Origin of a row."""

    uri: str
    content: str  # hash of the video


@dataclass(frozen=True, slots=True)
class _Side:
    """One snapshot with its list of files."""

    store: Store
    snapshot: Snapshot
    files: dict[str, tuple[str, str, tuple[int, ...]]]  # by key: index key, shard, positions of hidden rows

    def may_share_sources(self) -> bool:
        """Whether rows of a source may be in files of several receipts."""
        if len(self.snapshot.fingerprints) > 1:
            return True
        receipts = Snapshots(self.store).table(self.snapshot, "receipts", ["own_shard", "clips"])
        return bool(pc.any(pc.and_(pc.invert(receipts["own_shard"]), pc.greater(receipts["clips"], 0))).as_py())

    def rows(self, keys: Iterable[str], workers: int) -> dict[str, _Row]:
        """Visible rows in these files, by id."""
        takedowns = read_takedowns(self.store)

        def read(key: str) -> dict[str, _Row]:
            index_key, shard, hidden = self.files[key]
            try:
                rows, _ = read_index(self.store.read(index_key))
            except (InputError, ValueError, OSError) as error:
                if isinstance(error, NotFound) and may_be_deleted(self.store, takedowns, shard, index_key):
                    return {}
                raise OutputError(
                    f"{index_key} of snapshot {self.snapshot.number} cannot be read: {error}; see `lathe verify`",
                    uri=self.store.uri(index_key),
                ) from None
            left_out = set(hidden)
            shown = [row for row in rows if row.row not in left_out and not takedowns.hides(row)]
            return {row.id: _Row(row.source_uri, row.source_hash) for row in shown}

        found: dict[str, _Row] = {}
        with ThreadPoolExecutor(workers, thread_name_prefix="diff") as pool:
            for part in pool.map(read, keys):
                found.update(part)
        return found


def diff(a: tuple[Store, int | None], b: tuple[Store, int | None], workers: int = 8) -> dict[str, Any]:
    """Differences by kind. Sources that are only in `b` are "added", only in `a` "dropped".

    Of sources in both with other rows, those of other bytes are "replaced"; those of the same bytes are "re_encoded": they have more,
    fewer or other rows, of another fingerprint or of a retry.

    Raises:
        InputError: no such snapshot.
        OutputError: a snapshot or index that cannot be read.
    """
    one, two = _open(*a), _open(*b)
    added = sorted(set(two.files) - set(one.files))
    dropped = sorted(set(one.files) - set(two.files))
    changed = sorted(key for key in set(one.files) & set(two.files) if one.files[key] != two.files[key])
    before, after = one.rows(dropped + changed, workers), two.rows(added + changed, workers)
    gone = {name: row for name, row in before.items() if name not in after}
    new = {name: row for name, row in after.items() if name not in before}
    kept = {row.uri for name, row in before.items() if name in after}
    if (new or gone) and (
        one.may_share_sources() or two.may_share_sources() or _fingerprints(one) != _fingerprints(two)
    ):
        kept |= {row.uri for row in one.rows(set(one.files) & set(two.files) - set(changed), workers).values()}
    return {
        "a": _facts(one),
        "b": _facts(two),
        "counts": _differences(one.snapshot.counts, two.snapshot.counts),
        "rejects": _differences(one.snapshot.rejects, two.snapshot.rejects),
        "buckets": _differences(_rows_by_bucket(one.snapshot), _rows_by_bucket(two.snapshot)),
        "fingerprints": {
            "added": sorted(_fingerprints(two) - _fingerprints(one)),
            "dropped": sorted(_fingerprints(one) - _fingerprints(two)),
        },
        "files": {"added": added, "dropped": dropped, "changed": changed, "rewritten": _rewritten(two, added)},
        "rows": {"added": len(new), "dropped": len(gone)},
        "sources": _sources(new.values(), gone.values(), kept),
    }


def _rewritten(side: _Side, added: list[str]) -> list[str]:
    """Those of these files that a compaction wrote: their rows are those of other files, unless rows were added or dropped too."""
    copies = published_copies(side.store, side.snapshot.number)
    return [key for key in added if key in copies.files]


def _sources(new: Iterable[_Row], gone: Iterable[_Row], kept: set[str]) -> dict[str, list[str]]:
    """URIs by kind of change, from rows that came and went. `kept`: URIs that also have rows that stay."""
    came, went = _contents(new), _contents(gone)
    both = came.keys() & went.keys()
    # A tar of which one sample was rejected under new settings is not another tar.
    replaced = {uri for uri in both if not (came[uri] <= went[uri] or went[uri] <= came[uri])}
    return {
        "added": sorted(came.keys() - went.keys() - kept),
        "replaced": sorted(replaced),
        "re_encoded": sorted((both - replaced) | ((came.keys() ^ went.keys()) & kept)),
        "dropped": sorted(went.keys() - came.keys() - kept),
    }


def _contents(rows: Iterable[_Row]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.uri, set()).add(row.content)
    return found


def _fingerprints(side: _Side) -> set[str]:
    return set(side.snapshot.fingerprints)


def _open(store: Store, number: int | None) -> _Side:
    snapshots = Snapshots(store)
    snapshot = snapshots.get(number)
    columns = snapshots.table(snapshot, "files", ["key", "index_key", "shard_id", "hidden"]).to_pydict()
    files = {
        key: (index_key, shard, tuple(hidden)) for key, index_key, shard, hidden in zip(*columns.values(), strict=True)
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

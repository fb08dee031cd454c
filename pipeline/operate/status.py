"""Progress of an output, from the output alone: on any machine, during and after a build.

Takes a store, returns a JSON-ready dict: sums over receipts or of a snapshot, heartbeats of running and of killed builds, the end of the
last run from its log.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.totals import by_frequency, tally
from pipeline.operate.run_logs import last_run
from pipeline.records import Counts

if TYPE_CHECKING:
    from pipeline.format.layout import Layout
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.storage import Store

MISSED = 3  # intervals without a heartbeat, after which a build counts as dead


def status(store: Store, number: int | None = None, *, workers: int = 8) -> dict[str, Any]:
    """Counts of shards, samples in/encoded/rejected, clips, frames, bytes, rejects by reason, warnings; last commit; heartbeats.

    For a published output these are the numbers of a snapshot: the newest, or snapshot `number`. With the newest, `pending` counts
    receipts that it does not cover; no other receipt is read.

    Raises:
        OutputError: not a latent set, or a receipt that cannot be read.
        InputError: no snapshot `number`.
    """
    ledger = Ledger(store)
    latent_set = ledger.latent_set()
    snapshots = Snapshots(store)
    snapshot = snapshots.latest() if number is None else snapshots.read(number)
    if snapshot is not None:
        pending = _pending(ledger, snapshots, snapshot, workers) if number is None else None
        return {
            "output": store.root,
            "name": latent_set.name,
            "uuid": latent_set.uuid,
            **_published(snapshot),
            "pending": pending,
            **_builds(store, ledger.layout),
        }
    tallies = tally(store, workers)
    counts = sum((item.counts for item in tallies.values()), Counts())
    reasons: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    for item in tallies.values():
        reasons.update(item.rejects)
        warnings.update(item.warnings)
    return {
        "output": store.root,
        "name": latent_set.name,
        "uuid": latent_set.uuid,
        "fingerprints": {fingerprint: item.shards for fingerprint, item in tallies.items()},
        "shards": sum(item.shards for item in tallies.values()),
        **asdict(counts),
        "files": sum(item.files for item in tallies.values()),
        "bytes": sum(item.bytes for item in tallies.values()),
        "rejects": by_frequency(reasons),
        "warnings": by_frequency(warnings),
        "last_commit": max((item.last_commit for item in tallies.values() if item.last_commit), default=None),
        **_builds(store, ledger.layout),
    }


def live_status(store: Store) -> dict[str, Any]:
    """The part of `status` that is about builds, without the receipts. `last_run` is looked for once no build is running."""
    return {"output": store.root, **_builds(store, Ledger(store).layout, last_if_running=False)}


def _builds(store: Store, layout: Layout, *, last_if_running: bool = True) -> dict[str, Any]:
    live, dead = all_heartbeats(store, layout.progress)
    running = {str(found.get("build")) for found in live}
    return {
        "progress": live[-1] if live else None,
        "other_builds": live[:-1],
        "dead_builds": dead,
        "last_run": last_run(store, layout, running) if last_if_running or not live else None,
    }


def _published(snapshot: Snapshot) -> dict[str, Any]:
    counts = snapshot.counts
    return {
        "snapshot": {"number": snapshot.number, "parent": snapshot.parent, "created": snapshot.created},
        "fingerprints": {name: item.shards for name, item in snapshot.fingerprints.items()},
        **{name: n for name, n in counts.items() if name != "rows"},
        "clips": counts["rows"],
        "rejects": snapshot.rejects,
        "warnings": snapshot.warnings,
        "open_shards": list(snapshot.open_shards),
        "num_open": snapshot.num_open,
        "last_commit": snapshot.created,
    }


def _pending(ledger: Ledger, snapshots: Snapshots, snapshot: Snapshot, workers: int) -> dict[str, Any] | None:
    """Sums of receipts that the snapshot does not cover; None without such receipts. Replaced rows are subtracted only when published."""
    covered = set(snapshots.table(snapshot, "receipts", ["shard_id"])["shard_id"].to_pylist())
    left = ledger.keys_by_shard(without=covered)
    found = [receipt for receipt in ledger.read_all(left.values(), workers) if receipt is not None]
    if not found:
        return None
    counts = sum((receipt.added() for receipt in found), Counts())
    return {"shards": len(found), **asdict(counts), "last_commit": max(receipt.created for receipt in found)}


def heartbeats(store: Store, prefix: str) -> list[dict[str, Any]]:
    """Heartbeats of the running builds, the latest start last: the first of `all_heartbeats`."""
    return all_heartbeats(store, prefix)[0]


def all_heartbeats(store: Store, prefix: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Heartbeats of running builds, and of builds that were killed, each with the latest start last.

    A build runs if its object was renewed within `MISSED` of its intervals. When it was renewed is known from the store, so that the clock
    of the build's machine does not matter; it becomes `last_seen`, in seconds since 1970. An object of zero bytes is passed over: on a
    mount, a killed build leaves one.
    """
    live: list[dict[str, Any]] = []
    dead: list[dict[str, Any]] = []
    for info in store.list(prefix):
        if not info.size:
            continue
        try:
            found = json.loads(store.read(info.key))
            alive = time.time() - info.modified < MISSED * found["every_s"]
            (live if alive else dead).append({**found, "last_seen": info.modified})
        except NotFound:  # the build ended meanwhile
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{info.key} is not a heartbeat: {error}", uri=store.uri(info.key)) from None
    by_start = [sorted(builds, key=lambda found: str(found.get("started"))) for builds in (live, dead)]
    return by_start[0], by_start[1]

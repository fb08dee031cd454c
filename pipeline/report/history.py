"""Where a snapshot comes from: networks, builds since the parent, ancestors, differences to another snapshot.

Takes records of snapshots, metadata of one data file for each fingerprint, and ends of run logs.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from pipeline.errors import InputError, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.diff import diff
from pipeline.operate.inspect import file_metadata
from pipeline.operate.run_logs import events, run_logs
from pipeline.report.values import Build, Changes, Network

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.ledger.snapshots import PublishedFingerprint, Snapshot
    from pipeline.storage import Store

MOST_BUILDS = 20  # newest
MOST_ANCESTORS = 20
NAMES = 20  # of a list in differences
JOB_SECTIONS = ("model", "clips", "decode", "write", "variants")


def networks_of(store: Store, snapshot: Snapshot, files: pa.Table) -> tuple[Network, ...]:
    """Networks of a snapshot, by fingerprint. `files`: its table.

    Raises:
        InputError: a data file that cannot be read.
    """
    return tuple(_network(store, name, item, files) for name, item in sorted(snapshot.fingerprints.items()))


def _network(store: Store, name: str, item: PublishedFingerprint, files: pa.Table) -> Network:
    mine = files.filter(pc.and_(pc.equal(files["fingerprint"], name), pc.greater(files["rows"], 0)))
    there = next((key for key in mine["key"].to_pylist() if store.exists(key)), None)  # others may be taken down
    metadata: dict[str, Any] = {} if there is None else file_metadata(store, there)
    encoder = metadata.get("encoder", {})
    checkpoint = encoder.get("checkpoint") or {}
    return Network(
        fingerprint=name,
        name=item.network,
        weights=checkpoint.get("uri"),
        weights_sha256=checkpoint.get("weights_sha256") or encoder.get("latent_weights_sha256"),
        untrained=bool(encoder.get("untrained")),
        latent=metadata.get("latent", {}),
        rows=item.rows,
        frames=item.frames,
        bytes=item.bytes,
        spec=metadata.get("spec", {}),
        parts=item.parts,
    )


def builds_of(store: Store, snapshot: Snapshot, parent: Snapshot | None) -> tuple[Build, ...]:
    """Builds that started after the parent was made and before the snapshot was, oldest first; of many, the newest."""
    layout = Ledger(store).layout
    after, before = ("" if parent is None else _stamp(parent.created)), _stamp(snapshot.created)
    logs = {name: keys for name, keys in run_logs(store, layout).items() if after <= name[: len(before)] <= before}
    return tuple(_build(store, name, logs[name]) for name in sorted(logs)[-MOST_BUILDS:])


def _stamp(created: str) -> str:
    """Time as names of builds begin with it."""
    return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def _build(store: Store, name: str, keys: list[str]) -> Build:
    first = next(events(store, keys[:1]), {})
    ended = next((event for event in reversed(list(events(store, keys[-1:]))) if event["event"] == "ended"), None)
    if ended is None:
        return Build(name, first.get("ts"), None, None, device=first.get("device"))
    report = ended.get("report") or {}
    return Build(
        build=name,
        started=first.get("ts"),
        ended=ended.get("ts"),
        outcome=ended.get("outcome"),
        wall_s=report.get("wall_s"),
        frames=(report.get("counts") or {}).get("frames"),
        frames_per_s=report.get("frames_per_s"),
        encoders=report.get("encoders"),
        encoder_s=report.get("encoder_s"),
        device=report.get("device"),
    )


def changes_of(store: Store, snapshot: Snapshot, parent: Snapshot | None, against: int | None) -> Changes:
    """Differences of a snapshot, its lineage and ancestors.

    Raises:
        InputError: no snapshot `against`.
        OutputError: a snapshot or index that cannot be read.
    """
    lineage = dict(snapshot.lineage)
    job = lineage.pop("job", None) or {}
    lineage.pop("publisher", None)
    lost = lineage.pop("lost_receipts", None)
    if lost:
        lineage["lost_receipts"] = {name: value for name, value in lost.items() if name != "shards"}
    lineage["job"] = {name: job[name] for name in JOB_SECTIONS if name in job}
    lineage["num_inputs"] = len(job.get("inputs") or [])  # their names may be taken down
    differences = None if against is None else _cut(diff((store, against), (store, snapshot.number)))
    return Changes(
        snapshot.parent if parent is not None else None,
        snapshot.changes,
        differences,
        lineage,
        _ancestors(store, snapshot),
    )


def parent_of(store: Store, snapshot: Snapshot) -> tuple[Snapshot | None, list[str]]:
    """The parent, or None with a notice if it is gone or damaged: old snapshots are deleted by `lathe gc`."""
    if snapshot.parent is None:
        return None, []
    try:
        return Snapshots(store).read(snapshot.parent), []
    except (InputError, OutputError) as error:
        return None, [f"the parent, snapshot {snapshot.parent}, is not compared: {error.message}"]


def _ancestors(store: Store, snapshot: Snapshot) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    each: Snapshot | None = snapshot
    while each is not None and len(found) < MOST_ANCESTORS:
        facts = {"number": each.number, "created": each.created, "rows": each.counts["rows"]}
        found.append({**facts, "bytes": each.counts["bytes"], "rejected": each.counts["rejected"]})
        each, _ = parent_of(store, each)
    return tuple(found)


def _cut(differences: dict[str, Any]) -> dict[str, Any]:
    """Lists of names as their length and their first names."""
    return {
        name: _cut(value)
        if isinstance(value, dict)
        else ({"count": len(value), "first": value[:NAMES]} if isinstance(value, list) else value)
        for name, value in differences.items()
    }

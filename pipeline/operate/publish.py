"""Publication of the next snapshot of an output, if its checks pass (`lathe publish`). Files are listed, never copied.

Takes a store, the present listing of inputs (optional), and the canary check as a function (it needs torch). Returns the snapshot.
Without a listing nothing counts as removed, and open shards are known only from running builds.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import DrillConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import InputError, LatheError, OutputError, PublishFailed
from pipeline.ledger.candidate import gather
from pipeline.ledger.manifest import (
    CHOICES,
    COUNTS,
    FILES,
    arrow_on_malloc,
    choice_rows,
    merged_stats,
    packed_stats,
    release_memory,
    write_table,
)
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import PublishedFingerprint, Snapshot, Snapshots
from pipeline.ledger.summaries import source_id
from pipeline.operate import publish_checks as checks
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.inspect import file_metadata
from pipeline.operate.status import heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import StorageConfig
    from pipeline.ledger.candidate import Candidate
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.snapshots import Check
    from pipeline.operate.delta_log import DeltaView
    from pipeline.operate.publish_checks import Limits
    from pipeline.records import SourceObject
    from pipeline.storage import Store

    Canary = Callable[[Store, Sequence[CountedReceipt]], Check]

NAMED = 3  # of open shards, in messages
CANARY_RECEIPTS = 8
CONSTANTS = ("scale", "shift", "mean", "std")


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What to publish."""

    fingerprint: str | None = None  # only fingerprints with this prefix
    removed: Literal["keep", "drop"] = "keep"  # for inputs that are not listed any more
    partial: bool = False  # publish although shards are open
    limits: Limits = field(default_factory=checks.Limits)
    job: dict[str, Any] | None = None  # recorded as lineage
    delta: bool = True  # write the Delta view as well


@dataclass(frozen=True, slots=True)
class Published:
    """The newest snapshot. `made` is False if it already covered everything."""

    snapshot: Snapshot
    made: bool
    notices: list[str]
    delta: DeltaView | None = None  # state of the Delta view; None: not written


def list_inputs(inputs: Sequence[str], store: Store, storage: StorageConfig) -> list[SourceObject]:
    """Present inputs, sorted by URI, without latents of the output itself.

    Raises:
        InputError, AccessError: as for `lathe encode`.
    """
    ours = store.uri("data") + "/"
    found = [source for shard in resolve_inputs(inputs, storage) for source in shard.objects]
    return sorted((source for source in found if not source.uri.startswith(ours)), key=lambda source: source.uri)


def publish(
    store: Store,
    options: PublishOptions,
    *,
    listing: Sequence[SourceObject] | None = None,
    canary: Canary | None = None,
    failures: DrillConfig | None = None,
    workers: int = 8,
) -> Published:
    """Publishes a snapshot that covers all receipts, unless the newest already does.

    Args:
        store: the output.
        options: what to publish.
        listing: the present inputs; None: unknown.
        canary: encodes a few clips of these receipts again and compares; None: this check is left out.
        failures: where to fail on purpose, for tests.
        workers: threads that read receipts.

    Raises:
        OutputError: not an output, or of another format version; a Delta log that another program wrote to.
        InputError: no receipt, or none of this fingerprint; `removed` "drop" without a listing.
        PublishFailed: a check failed, shards are open, or another publisher was first. Nothing was published.
    """
    if options.removed == "drop" and listing is None:
        raise InputError(
            "--removed drop needs the inputs: lathe publish OUTPUT INPUT…; without them removed inputs are unknown"
        )
    Ledger(store).latent_set()
    with arrow_on_malloc(), tempfile.TemporaryDirectory(prefix="lathe-publish-") as folder:
        published = _publish(store, options, listing, canary, Snapshots(store, failures), Path(folder), workers)
        try:
            view = _delta_view(store, options)
            notices = view.notices() if view is not None else []
            return replace(published, notices=[*published.notices, *notices], delta=view)
        except LatheError as error:
            raise OutputError(
                f"snapshot {published.snapshot.number} is published, but its Delta view was not written: {error}; publish again "
                "to write it, or use --no-delta"
            ) from error


def _publish(
    store: Store,
    options: PublishOptions,
    listing: Sequence[SourceObject] | None,
    canary: Canary | None,
    snapshots: Snapshots,
    folder: Path,
    workers: int,
) -> Published:
    parent, number = snapshots.newest_and_next()
    if options.delta:
        DeltaLog(store).check()
    candidate = gather(
        store,
        parent,
        folder,
        fingerprint=options.fingerprint,
        listing=listing,
        drop_missing=options.removed == "drop",
        save=True,
        workers=workers,
    )
    if not candidate.receipts.num_rows:
        asked = f" of fingerprint {options.fingerprint}" if options.fingerprint else ""
        raise InputError(f"{store.root} has no receipt{asked}: nothing is encoded yet; run `lathe encode` first")
    _check_receipts_are_there(store, candidate, options.fingerprint or "")
    open_shards = _open_shards(store, candidate)
    if open_shards and not options.partial:
        raise PublishFailed(
            f"{len(open_shards)} shards or inputs are not done: {', '.join(open_shards[:NAMED])}; finish them with "
            "`lathe encode`, or publish what is done with --partial"
        )
    if parent is not None and tuple(open_shards) == parent.open_shards and candidate.unchanged:
        return Published(parent, False, [f"snapshot {parent.number} already covers everything; nothing was published"])
    release_memory()
    snapshot = _checked(store, candidate, options, number, open_shards, listing, canary)
    release_memory()
    tables = {"files": candidate.files_path, "receipts": candidate.receipts_path}
    if any(candidate.decisions.selection.choices.values()):
        choices = pa.Table.from_pylist(list(choice_rows(candidate.decisions.selection.choices)), schema=CHOICES)
        tables["choices"] = write_table(choices, folder / "choices")
    snapshot.tables.update(snapshots.write_tables(number, tables))
    snapshots.create(snapshot)
    return Published(snapshot, True, _notices(store, snapshot))


def _check_receipts_are_there(store: Store, candidate: Candidate, fingerprint: str) -> None:
    """Rows whose receipt was lost would otherwise leave the next snapshot without a word.

    Raises:
        PublishFailed: receipts of files that the parent names are gone.
    """
    if candidate.parent is None:
        return
    files = Snapshots(store).table(candidate.parent, "files", ["shard_id", "fingerprint"])
    lost = pc.invert(pc.is_in(files["shard_id"], candidate.decisions.shards))
    lost = files.filter(pc.and_(lost, pc.starts_with(files["fingerprint"], fingerprint)))
    if gone := sorted(lost["shard_id"].unique().to_pylist()):
        raise PublishFailed(
            f"{len(gone)} receipts of {store.root} are gone although snapshot {candidate.parent.number} "
            f"names their files, such as that of shard {gone[0]}; restore them, or remove their rows by a takedown"
        )


def _delta_view(store: Store, options: PublishOptions) -> DeltaView | None:
    """Brings the Delta view up to date, also where an earlier publisher was killed before it did."""
    release_memory()
    return DeltaLog(store).sync() if options.delta else None


def _checked(
    store: Store,
    candidate: Candidate,
    options: PublishOptions,
    number: int,
    open_shards: list[str],
    listing: Sequence[SourceObject] | None,
    canary: Canary | None,
) -> Snapshot:
    prints = _fingerprints(store, candidate)
    limits = options.limits
    done = [
        checks.conservation_check(candidate),
        checks.files_check(store, candidate.files),
        checks.reject_check(candidate.receipts, limits),
        checks.finite_check(candidate),
        checks.drift_check(candidate, limits),
        checks.constants_check({name: (item.stats, item.constants) for name, item in prints.items()}, limits),
    ]
    if canary is not None and all(check.ok for check in done):
        done.append(canary(store, candidate.fresh_parts(store, CANARY_RECEIPTS)))
    if failed := [check for check in done if not check.ok]:
        error = PublishFailed(
            f"snapshot {number} was not published, {len(failed)} of {len(done)} checks failed: "
            + "; ".join(f"{check.name}: {check.message}" for check in failed)
        )
        error.checks = done  # type: ignore[attr-defined]
        raise error
    return Snapshot(
        number=number,
        parent=None if candidate.parent is None else candidate.parent.number,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        counts=_counts(candidate),
        rejects=_rejects(candidate),
        buckets=_buckets(candidate.files),
        fingerprints=prints,
        changes=_changes(store, candidate),
        lineage=_lineage(candidate, options, listing),
        checks=tuple(done),
        open_shards=tuple(open_shards),
        takedowns=tuple(item.key for item in candidate.decisions.overlaps.takedowns.records),
        tables={},
    )


def _open_shards(store: Store, candidate: Candidate) -> list[str]:
    """What is known not to be done: listed sources without a receipt, receipts that were cut off, shards of a running build."""
    found = [source.uri for source in candidate.decisions.selection.open_sources]
    found += [f"receipt of shard {shard} (cut off)" for shard in candidate.cut_off]
    running = heartbeat(store, Ledger(store).layout.progress)
    if running is not None and running.get("running", True):
        left = int(running.get("shards_total") or 0) - int(running.get("shards_done") or 0)
        found += [f"{left} shards of the running build {running.get('build')}"] if left > 0 else []
    return found


def _fingerprints(store: Store, candidate: Candidate) -> dict[str, PublishedFingerprint]:
    found = {}
    known = candidate.parent.fingerprints if candidate.parent is not None else {}
    names = sorted(candidate.receipts["fingerprint"].unique().to_pylist())
    for fingerprint in names:
        receipts, files = candidate.receipts, candidate.files
        if len(names) > 1:  # a filtered table is a copy
            receipts = receipts.filter(pc.equal(receipts["fingerprint"], fingerprint))
            files = files.filter(pc.equal(files["fingerprint"], fingerprint))
        if fingerprint in known:
            parts, constants = known[fingerprint].parts, known[fingerprint].constants
        else:
            parts = _parts(store, candidate, receipts["shard_id"][0].as_py())
            constants = _constants(store, files)
        found[fingerprint] = PublishedFingerprint(
            parts=parts,
            network=files["network"][0].as_py() if files.num_rows else "",
            shards=_sum(receipts, "own_shard"),
            files=files.num_rows,
            rows=_sum(files, "rows"),
            frames=_sum(files, "frames"),
            bytes=_sum(files, "bytes"),
            stats=merged_stats(values for _, values in packed_stats(candidate.receipts_path, fingerprint)),
            constants=constants,
        )
    return found


def _parts(store: Store, candidate: Candidate, shard: str) -> dict[str, Any]:
    receipt = Ledger(store).load(candidate.decisions.key(shard))
    return {} if receipt is None else receipt.fingerprint_parts


def _constants(store: Store, files: pa.Table) -> dict[str, Any]:
    """Constants of the network's authors from the metadata of a data file; empty if it cannot be read (`files_check` reports that)."""
    try:
        spec = file_metadata(store, files["key"][0].as_py()).get("spec", {}) if files.num_rows else {}
    except InputError:
        return {}
    return {name: spec.get(name) for name in CONSTANTS}


def _counts(candidate: Candidate) -> dict[str, int]:
    receipts, files = candidate.receipts, candidate.files
    totals = {name: _sum(receipts, name) for name in COUNTS}
    kept = {name: totals[name] for name in ("samples", "encoded", "rejected", "clips_rejected", "damaged")}
    sums = {name: _sum(files, name) for name in ("rows", "frames", "bytes")}
    return {"shards": _sum(receipts, "own_shard"), **kept, "files": files.num_rows, **sums}


def _rejects(candidate: Candidate) -> dict[str, int]:
    found: Counter[str] = Counter()
    texts = pc.value_counts(candidate.receipts["rejects"])
    for item in texts.to_pylist():
        for reason, n in json.loads(item["values"]).items():
            found[reason] += n * item["counts"]
    return dict(found.most_common())


def _buckets(files: pa.Table) -> dict[str, dict[str, int]]:
    grouped = files.group_by("bucket").aggregate(
        [("key", "count"), ("rows", "sum"), ("frames", "sum"), ("bytes", "sum")]
    )
    return {
        row["bucket"]: {
            "files": row["key_count"],
            "rows": row["rows_sum"],
            "frames": row["frames_sum"],
            "bytes": row["bytes_sum"],
        }
        for row in grouped.sort_by("bucket").to_pylist()
    }


def _changes(store: Store, candidate: Candidate) -> dict[str, int]:
    changes, columns = candidate.decisions.selection.changes, ["key", "rows"]
    now, before = candidate.files.select(columns), FILES.empty_table().select(columns)
    if candidate.parent is not None:
        before = Snapshots(store).table(candidate.parent, "files", columns)
    release_memory()
    new, gone = now, before
    if before.num_rows:
        new = now.filter(pc.invert(pc.is_in(now["key"], before["key"].combine_chunks())))
        gone = before.filter(pc.invert(pc.is_in(before["key"], now["key"].combine_chunks())))
    rows_of_both = _sum(now, "rows") - _sum(new, "rows") - (_sum(before, "rows") - _sum(gone, "rows"))
    return {
        "inputs_added": changes.added,
        "inputs_replaced": changes.replaced,
        "inputs_removed": changes.removed,
        "files_added": new.num_rows,
        "files_dropped": gone.num_rows,
        "rows_added": _sum(new, "rows") + max(0, rows_of_both),
        "rows_dropped": _sum(gone, "rows") + max(0, -rows_of_both),
    }


def _lineage(candidate: Candidate, options: PublishOptions, listing: Sequence[SourceObject] | None) -> dict[str, Any]:
    """Origin of the snapshot. The digest of the listing is over (uri, size, etag) of the inputs, or over the versions that count."""
    digest = hashlib.blake2b(digest_size=16)
    names = sorted(map(source_id, listing)) if listing is not None else sorted(candidate.decisions.version_names())
    for name in names:
        digest.update(name)
    source = {"from": "receipts" if listing is None else "inputs", "count": len(names), "digest": digest.hexdigest()}
    return {
        "lathe": version("lathe"),
        "job": options.job,
        "listing": source,
        "removed": options.removed,
        "publisher": secrets.token_hex(
            8
        ),  # no two records are equal: a publisher knows whether it was its own that won
    }


def _notices(store: Store, snapshot: Snapshot) -> list[str]:
    found = [
        f"check {check.name} was not judged: {check.message or 'nothing to compare'}"
        for check in snapshot.checks
        if not check.judged
    ]
    if snapshot.open_shards:
        found.append(f"{len(snapshot.open_shards)} shards or inputs are not done and not in the snapshot (--partial)")
    if not store.conditional_writes():
        found.append(
            f"{store.root}: the store has no conditional writes, so it cannot refuse a second publisher; let only one run at a time"
        )
    return found


def _sum(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)

"""Record of the next snapshot, from a candidate whose checks passed: counts, rejects, warnings, statistics, changes, lineage.

Takes the store and a `Candidate`, returns a `Snapshot` without tables. Reads one data file and one receipt of each new fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.ledger.manifest import (
    CHOICES,
    COUNTS,
    FILES,
    OPEN,
    choice_rows,
    merged_stats,
    packed_stats,
    read_batches,
    release_memory,
    write_table,
)
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import PublishedFingerprint, Snapshot
from pipeline.ledger.summary import source_id
from pipeline.operate.inspect import file_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.ledger.candidate import Candidate
    from pipeline.ledger.snapshots import Check
    from pipeline.records import SourceObject
    from pipeline.storage import Store

CONSTANTS = ("scale", "shift", "mean", "std")


def snapshot_of(
    candidate: Candidate,
    number: int,
    prints: dict[str, PublishedFingerprint],
    done: Sequence[Check],
    open_shards: Sequence[str],
    lineage: dict[str, Any],
) -> Snapshot:
    """The record of snapshot `number`.

    Args:
        candidate: its contents.
        number: of the snapshot.
        prints: see `fingerprints_of`.
        done: checks that passed.
        open_shards: what is known not to be done, as the record names it.
        lineage: see `lineage_of`.
    """
    return Snapshot(
        number=number,
        parent=None if candidate.parent is None else candidate.parent.number,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        counts=_counts(candidate),
        rejects=_summed(candidate.receipts["rejects"]),
        warnings=_summed(candidate.receipts["warnings"]),
        buckets=_buckets(candidate.files),
        fingerprints=prints,
        changes=changes_of(candidate),
        lineage=lineage,
        checks=tuple(done),
        open_shards=tuple(open_shards),
        takedowns=tuple(item.key for item in candidate.decisions.overlaps.takedowns.records),
        passed_over=(),
        tables={},
        videos=_videos(candidate.receipts_path),
    )


def fingerprints_of(store: Store, candidate: Candidate) -> dict[str, PublishedFingerprint]:
    """Parts of the snapshot by fingerprint. Facts that the parent lacks, because it had no file to read them from, are read now."""
    found = {}
    known = candidate.parent.fingerprints if candidate.parent is not None else {}
    names = sorted(candidate.receipts["fingerprint"].unique().to_pylist())
    for fingerprint in names:
        receipts, files = candidate.receipts, candidate.files
        if len(names) > 1:  # a filtered table is a copy
            receipts = receipts.filter(pc.equal(receipts["fingerprint"], fingerprint))
            files = files.filter(pc.equal(files["fingerprint"], fingerprint))
        parts, constants = {}, {}
        if fingerprint in known:
            parts, constants = known[fingerprint].parts, known[fingerprint].constants
        parts = parts or _parts(store, candidate, receipts["shard_id"][0].as_py())
        if all(value is None for value in constants.values()):
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


def _summed(texts: pa.ChunkedArray) -> dict[str, int]:
    """Sums of counts by name, given as JSON; largest first."""
    found: Counter[str] = Counter()
    for item in pc.value_counts(texts).to_pylist():
        for name, n in json.loads(item["values"]).items():
            found[name] += n * item["counts"]
    return dict(found.most_common())


def _videos(receipts: Path) -> dict[str, dict[str, int]]:
    """Sums of `CountedReceipt.videos`, given as JSON in the table of receipts; of receipts that have it."""
    found: dict[str, Counter[str]] = {}
    for batch in read_batches(receipts, ["videos"]):
        for text in batch["videos"].drop_null().to_pylist():
            for name, counts in json.loads(text).items():
                found.setdefault(name, Counter()).update(counts)
    return {name: dict(counts) for name, counts in sorted(found.items())}


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


def tables_of(candidate: Candidate, folder: Path, unnamed: Sequence[str] = ()) -> dict[str, Path]:
    """Tables of the snapshot as Parquet files, by name. `unnamed`: all that is known not to be done, if the record does not name all."""
    tables = {"files": candidate.files_path, "receipts": candidate.receipts_path}
    if any(candidate.decisions.selection.choices.values()):
        choices = pa.Table.from_pylist(list(choice_rows(candidate.decisions.selection.choices)), schema=CHOICES)
        tables["choices"] = write_table(choices, folder / "choices")
    if unnamed:
        tables["open"] = write_table(pa.table({"name": unnamed}, OPEN), folder / "open")
    if candidate.copies:
        tables["copies"] = write_table(candidate.copies.table, folder / "copies")
    return tables


def changes_of(candidate: Candidate) -> dict[str, int]:
    """Inputs, files and rows that came and went since the parent, counted."""
    changes, columns = candidate.decisions.selection.changes, ["key", "rows", "hidden", "shard_id"]
    now, before = candidate.files.select(columns), FILES.empty_table().select(columns)
    if candidate.parent_files is not None:
        # Rows of all other shards are the parent's.
        now = now.filter(pc.is_in(now["shard_id"], pa.concat_arrays([candidate.fresh, candidate.outdated])))
        parts = (
            batch.filter(pc.is_in(batch["shard_id"], candidate.outdated))
            for batch in read_batches(candidate.parent_files, columns)
        )
        before = pa.Table.from_batches(parts, before.schema)
    release_memory()
    new, gone = now, before
    if before.num_rows:
        new = now.filter(pc.invert(pc.is_in(now["key"], before["key"].combine_chunks())))
        gone = before.filter(pc.invert(pc.is_in(before["key"], now["key"].combine_chunks())))
    shown, hidden = _rows_of_both(now, before)
    return {
        "inputs_added": changes.added,
        "inputs_replaced": changes.replaced,
        "inputs_removed": changes.removed,
        "files_added": new.num_rows,
        "files_dropped": gone.num_rows,
        "rows_added": _sum(new, "rows") + shown,
        "rows_dropped": _sum(gone, "rows") + hidden,
    }


def _rows_of_both(now: pa.Table, before: pa.Table) -> tuple[int, int]:
    """Rows of files in both tables that count only now, and those that counted only before."""
    if not before.num_rows:
        return 0, 0
    now = now.filter(pc.is_in(now["key"], before["key"].combine_chunks())).sort_by("key")
    before = before.filter(pc.is_in(before["key"], now["key"].combine_chunks())).sort_by("key")
    shown = hidden = 0
    for new, old in zip(now["hidden"], before["hidden"], strict=True):
        if new != old:
            hidden_now, hidden_before = set(new.as_py()), set(old.as_py())
            shown += len(hidden_before - hidden_now)
            hidden += len(hidden_now - hidden_before)
    return shown, hidden


def lineage_of(
    candidate: Candidate, listing: Sequence[SourceObject] | None, job: dict[str, Any] | None, removed: str
) -> dict[str, Any]:
    """Origin of the snapshot. The digest of the listing is over (uri, size, etag) of the inputs, or over the versions that count."""
    digest = hashlib.blake2b(digest_size=16)
    names = sorted(map(source_id, listing)) if listing is not None else sorted(candidate.decisions.version_names())
    for name in names:
        digest.update(name)
    source = {"from": "receipts" if listing is None else "inputs", "count": len(names), "digest": digest.hexdigest()}
    return {
        "lathe": version("lathe"),
        "job": job,
        "listing": source,
        "removed": removed,
        # No two records are equal: a publisher knows whether it was its own that won.
        "publisher": secrets.token_hex(8),
    }


def _sum(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)

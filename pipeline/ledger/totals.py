"""Sums over the receipts of an output, by fingerprint and bucket.

Takes the store of an output, returns `OutputTotals`s, JSON-ready. Used by `status` and `inspect`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.ledger.counted import counted_receipts, shares
from pipeline.records import ChannelStats, Counts, Timings

if TYPE_CHECKING:
    from pipeline.ledger.counted import Share
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.storage import Store


@dataclass(slots=True)
class BucketTotals:
    """Sums of one bucket."""

    files: int = 0
    clips: int = 0
    frames: int = 0
    bytes: int = 0


@dataclass(slots=True)
class OutputTotals:
    """Sums over all shards of one fingerprint."""

    fingerprint: str
    fingerprint_parts: dict[str, Any]
    shards: int = 0
    files: int = 0
    bytes: int = 0  # data files
    index_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    buckets: dict[str, BucketTotals] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    warnings: dict[str, int] = field(default_factory=dict)  # see `Receipt.warnings`
    stats: ChannelStats | None = None
    stats_clips: int = 0  # clips that `stats` covers
    timings: Timings = field(default_factory=Timings)
    first_commit: str | None = None
    last_commit: str | None = None
    sample_file: str | None = None  # key of a data file, to read the metadata from

    def add(self, part: CountedReceipt, counts: Counts, shares: list[Share]) -> None:
        """Adds the part of one shard that counts. Statistics and warnings of a partly hidden receipt are left out: splitting
        statistics would read latents (`part_statistics`, for snapshots), warnings cannot be split.
        """
        receipt = part.receipt
        self.shards += receipt.shard.retry is None and not receipt.same_as
        self.counts += counts
        self.timings += receipt.timings
        self.first_commit = min(self.first_commit or receipt.created, receipt.created)
        self.last_commit = max(self.last_commit or receipt.created, receipt.created)
        if receipt.stats is not None and part.whole:
            self.stats = receipt.stats if self.stats is None else self.stats.merge(receipt.stats)
            self.stats_clips += receipt.counts.clips
        for warning, n in receipt.warnings.items() if part.whole else ():
            self.warnings[warning] = self.warnings.get(warning, 0) + n
        for reject in receipt.rejects:
            if part.reject_counts(reject):
                self.rejects[reject.reason] = self.rejects.get(reject.reason, 0) + 1
        for share in shares:
            if share.rows:  # other files may be deleted
                self.sample_file = self.sample_file or share.file.key
            first = share.copy is None or (share.copy.first == 0 and share.copy.rows > 0)  # of a compacted file
            self.files += first
            self.bytes += share.num_bytes
            self.index_bytes += share.file.index_bytes if first else 0
            bucket = self.buckets.setdefault(share.file.bucket, BucketTotals())
            bucket.files += first
            bucket.clips += share.rows
            bucket.frames += share.frames
            bucket.bytes += share.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; rejects most frequent first, buckets by name."""
        return {
            "fingerprint": self.fingerprint,
            "fingerprint_parts": self.fingerprint_parts,
            "shards": self.shards,
            "files": self.files,
            "bytes": self.bytes,
            "index_bytes": self.index_bytes,
            "counts": asdict(self.counts),
            "buckets": {name: asdict(bucket) for name, bucket in sorted(self.buckets.items())},
            "rejects": by_frequency(self.rejects),
            "warnings": by_frequency(self.warnings),
            "statistics": describe_stats(self.stats),
            "statistics_clips": self.stats_clips,
            "timings": asdict(self.timings),
            "first_commit": self.first_commit,
            "last_commit": self.last_commit,
        }


def tally(store: Store, workers: int = 8) -> dict[str, OutputTotals]:
    """One `OutputTotals` for each fingerprint of an output, in the order of receipts. Each source and sample counts once.

    Raises:
        OutputError: a receipt of another format version, or of another shard.
    """
    found: dict[str, OutputTotals] = {}
    for part in counted_receipts(store, workers):
        receipt = part.receipt
        if receipt.fingerprint not in found:
            found[receipt.fingerprint] = OutputTotals(receipt.fingerprint, receipt.fingerprint_parts)
        if not part.superseded:
            found[receipt.fingerprint].add(part, *shares(store, part))
    return found


def describe_stats(stats: ChannelStats | None) -> dict[str, Any] | None:
    """Number of values per channel, and mean, standard deviation, smallest and largest of each; None without values."""
    if stats is None or stats.n == 0:
        return None
    return {
        "values_per_channel": stats.n,
        "mean": list(stats.mean),
        "std": [math.sqrt(m2 / stats.n) for m2 in stats.m2],
        "min": list(stats.min),
        "max": list(stats.max),
    }


def by_frequency(reasons: dict[str, int]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))

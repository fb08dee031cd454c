"""Receipts added up: what an output holds, by fingerprint and bucket.

Enters: receipts. Leaves: `Tally`s, JSON-ready. `status`, `inspect` and `verify` all count this way.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.records import ChannelStats, Counts, Timings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import Receipt


@dataclass(slots=True)
class BucketTally:
    """One bucket's share."""

    files: int = 0
    clips: int = 0
    frames: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Tally:
    """All shards made with one fingerprint."""

    fingerprint: str
    fingerprint_parts: dict[str, Any]
    shards: int = 0
    files: int = 0
    bytes: int = 0  # data files
    index_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    buckets: dict[str, BucketTally] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    stats: ChannelStats | None = None
    timings: Timings = field(default_factory=Timings)
    first_commit: str | None = None
    last_commit: str | None = None
    sample_file: str | None = None  # key of some data file: where the metadata can be read

    def add(self, receipt: Receipt) -> None:
        """Counts one shard."""
        self.shards += 1
        self.counts += receipt.counts
        self.timings += receipt.timings
        self.first_commit = min(self.first_commit or receipt.created, receipt.created)
        self.last_commit = max(self.last_commit or receipt.created, receipt.created)
        if receipt.stats is not None:
            self.stats = receipt.stats if self.stats is None else self.stats.merge(receipt.stats)
        for reject in receipt.rejects:
            self.rejects[reject.reason] = self.rejects.get(reject.reason, 0) + 1
        for item in receipt.files:
            self.sample_file = self.sample_file or item.key
            self.files += 1
            self.bytes += item.num_bytes
            self.index_bytes += item.index_bytes
            bucket = self.buckets.setdefault(item.bucket, BucketTally())
            bucket.files += 1
            bucket.clips += item.rows
            bucket.frames += item.frames
            bucket.bytes += item.num_bytes

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
            "statistics": describe_stats(self.stats),
            "timings": asdict(self.timings),
            "first_commit": self.first_commit,
            "last_commit": self.last_commit,
        }


def tally(receipts: Iterable[Receipt]) -> dict[str, Tally]:
    """One `Tally` for each fingerprint, in the order they are met."""
    found: dict[str, Tally] = {}
    for receipt in receipts:
        if receipt.fingerprint not in found:
            found[receipt.fingerprint] = Tally(receipt.fingerprint, receipt.fingerprint_parts)
        found[receipt.fingerprint].add(receipt)
    return found


def describe_stats(stats: ChannelStats | None) -> dict[str, Any] | None:
    """Values per channel, and mean, standard deviation, smallest and largest of each; None where there is nothing."""
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

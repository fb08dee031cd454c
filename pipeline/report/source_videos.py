"""Length and size of source videos, all inputs against encoded ones, and buckets by the share they lost, from the record of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.records.video_counts import LENGTH, LENGTHS_S, MILLISECONDS, SIDE, SIDES_PX, by_step
from pipeline.report.values import BucketLoss, Histogram, SourceVideos

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.records import VideoCounts


def source_videos(snapshot: Snapshot) -> SourceVideos | None:
    """None if no receipt of the snapshot records them."""
    encoded, rejected = (snapshot.videos.get(name, {}) for name in ("encoded", "rejected"))
    if not encoded and not rejected:
        return None
    return SourceVideos(
        encoded=sum(by_step(encoded, SIDE).values()),
        rejected=max(sum(by_step(rejected, kind).values()) for kind in (SIDE, LENGTH)),
        encoded_s=encoded.get(MILLISECONDS, 0) / 1000,
        rejected_s=rejected.get(MILLISECONDS, 0) / 1000,
        histograms=(
            _histogram("Source videos by length", "at least", LENGTH, LENGTHS_S, _length, encoded, rejected),
            _histogram(
                "Source videos by size", "pixels of the shorter side, at least", SIDE, SIDES_PX, str, encoded, rejected
            ),
        ),
    )


def bucket_losses(snapshot: Snapshot) -> tuple[BucketLoss, ...]:
    """Buckets that lost clips or to which refused videos were nearest, largest share first."""
    lost, refused = (snapshot.videos.get(name, {}) for name in ("lost", "refused"))
    found = []
    for name in {**lost, **refused}:
        rows = snapshot.buckets.get(name, {"rows": 0})["rows"]
        dropped = lost.get(name, 0) + refused.get(name, 0)
        found.append(BucketLoss(name, rows, lost.get(name, 0), refused.get(name, 0), dropped / (rows + dropped)))
    return tuple(sorted(found, key=lambda item: (-item.share, item.rows, item.bucket)))


def _histogram(
    name: str,
    unit: str,
    kind: str,
    steps: tuple[int, ...],
    label: Callable[[int], str],
    encoded: VideoCounts,
    rejected: VideoCounts,
) -> Histogram:
    """From the first step with a video to the last, those between included."""
    kept, left = by_step(encoded, kind), by_step(rejected, kind)
    there = sorted({*kept, *left})
    shown = sorted({*there, *(step for step in steps if there and there[0] < step < there[-1])})
    series = {
        "all inputs": tuple(kept.get(step, 0) + left.get(step, 0) for step in shown),
        "encoded": tuple(kept.get(step, 0) for step in shown),
    }
    return Histogram(name, unit, tuple(map(label, shown)), series)


def _length(seconds: int) -> str:
    """`30 s`, `2 min`, `1 h`: steps are whole ones of these."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds // size} {name}"
    return f"{seconds} s"

"""What each worker of a build does and what it waits for, from two of its pulses. Plain values, no clock, no I/O.

Takes `WorkerStats` of two times, gives shares of the time between them, a rate, and a bounded description of all workers for the heartbeat.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.engine.worker.worker_stats import WorkerStats

LISTED = 64  # workers described one by one
SLOWEST = 16  # described, where there are more
# What the time of an encode loop goes to, by field of `WorkerStats`.
SHARES = {
    "encode": "encode_s",
    "compile": "compile_s",
    "decode": "decode_wait_s",
    "fetch": "fetch_wait_s",
    "upload": "upload_wait_s",
    "idle": "idle_s",
}


@dataclass(frozen=True, slots=True)
class Activity:
    """A worker in the time between two pulses. `shares` of that time; what is missing to 1 is work between steps."""

    doing: str  # encode, compile, or what it waits for: decode, fetch, upload, idle; busy: anything else; starting: no two pulses yet
    shares: dict[str, float]
    frames_per_s: float
    video: str


STARTING = Activity("starting", {}, 0.0, "")


def activity(before: WorkerStats, after: WorkerStats, seconds: float) -> Activity:
    """What the worker did between two pulses that are `seconds` apart."""
    if seconds <= 0:
        return STARTING
    spent = {name: (getattr(after, field) - getattr(before, field)) / seconds for name, field in SHARES.items()}
    shares = {name: round(share, 3) for name, share in spent.items() if share >= 0.0005}
    doing = max(spent, key=lambda name: spent[name]) if shares else "busy"
    return Activity(doing, shares, round((after.frames - before.frames) / seconds, 2), after.video)


def describe(
    activities: Mapping[str, Activity], held: Mapping[str, Mapping[str, float]], *, now: float, outage: bool
) -> dict[str, Any]:
    """The workers of a build, JSON-ready: `num`, `doing` (number of workers by what they do) and `listed`.

    Args:
        activities: of every worker that is up.
        held: by worker the names of the shards it holds, with the time at which each was handed out.
        now: the present time, of the same clock.
        outage: the build waits for storage: workers without a shard wait for its end.
    """
    doing = {}
    for worker, found in activities.items():
        waits = outage and not held.get(worker)
        doing[worker] = "outage" if waits else found.doing
    listed = list(activities)
    if len(listed) > LISTED:
        busy = [worker for worker in listed if held.get(worker)] or listed
        listed = sorted(busy, key=lambda worker: activities[worker].frames_per_s)[:SLOWEST]
    return {
        "num": len(activities),
        "doing": dict(Counter(doing.values()).most_common()),
        "listed": [
            _described(worker, activities[worker], doing[worker], held.get(worker, {}), now) for worker in listed
        ],
        "only_slowest": len(listed) < len(activities),
    }


def _described(worker: str, found: Activity, doing: str, held: Mapping[str, float], now: float) -> dict[str, Any]:
    """The oldest shard is the one it works on; the next one is fetched meanwhile."""
    shard = min(held, key=lambda name: held[name], default=None)
    return {
        "worker": worker,
        "doing": doing,
        "shares": found.shares,
        "frames_per_s": found.frames_per_s,
        "shard": shard,
        "shard_s": None if shard is None else round(now - held[shard], 1),
        "shards": len(held),
        "video": found.video or None,
    }

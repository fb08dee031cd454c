"""Decision about a shard whose worker's node goes away at a known time: finished there, or handed back. No clock, no I/O."""

from __future__ import annotations

MARGIN_S = 15.0  # before the deadline, for the receipt and for an attempt to delete its files
SLOWER = 1.25  # an attempt may need this much longer than it looks
ENOUGH = 0.05  # share of a shard that must be done before its own pace is trusted


def finishes_in_time(elapsed_s: float, share: float, typical_s: float | None, left_s: float) -> bool:
    """Whether an attempt is expected to commit before the deadline.

    Args:
        elapsed_s: seconds since the attempt began.
        share: of the shard that is done, 0 to 1.
        typical_s: median duration of the build's shards; None before the first has ended.
        left_s: seconds until the deadline; `inf` where there is none.
    """
    if left_s == float("inf"):
        return True
    if share >= ENOUGH:
        rest_s = elapsed_s * (1 - share) / share
    elif typical_s is not None:
        rest_s = max(typical_s - elapsed_s, typical_s * ENOUGH)
    else:
        return False
    return rest_s * SLOWER <= left_s - MARGIN_S

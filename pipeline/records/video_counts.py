"""Source videos counted by length and size in fixed steps: plain dicts of counts, which add up over objects, shards and snapshots.

`ms`: sum of their lengths in milliseconds. `s10`: videos of 10 s up to the next of `LENGTHS_S`. `px720`: videos whose shorter side, as
displayed, has 720 pixels up to the next of `SIDES_PX`. A name without videos is left out. Still images have a size and no length.
"""

from __future__ import annotations

from bisect import bisect_right

LENGTHS_S = (0, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
SIDES_PX = (0, 144, 240, 360, 480, 720, 1080, 1440, 2160)
LENGTH, SIDE, MILLISECONDS = "s", "px", "ms"

VideoCounts = dict[str, int]


def video_counts(width: int, height: int, duration_s: float | None = None) -> VideoCounts:
    """One video of this size in pixels, 0 if that is not known. `duration_s`: None for a still image, or if it is not known."""
    found = {f"{SIDE}{_step(SIDES_PX, min(width, height))}": 1} if min(width, height) > 0 else {}
    if duration_s is not None:
        found |= {f"{LENGTH}{_step(LENGTHS_S, duration_s)}": 1, MILLISECONDS: round(1000 * duration_s)}
    return found


def by_step(counts: VideoCounts, kind: str) -> dict[int, int]:
    """Videos by the lower end of each step, ascending. `kind`: `LENGTH` or `SIDE`."""
    found = {name.removeprefix(kind): n for name, n in counts.items() if name.startswith(kind)}
    return dict(sorted((int(step), n) for step, n in found.items() if step.isdigit()))


def _step(steps: tuple[int, ...], value: float) -> int:
    return steps[max(0, bisect_right(steps, value) - 1)]

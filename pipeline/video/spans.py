"""Annotated spans of a video as places on its sampling grid. Takes `TimeSpan`s and frame times; gives `Place`s, and rejects of the others.

Spans may overlap, in any order. A span that cannot be used costs its own clips only; the spans of one reason are one reject.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.records import Reject
from pipeline.video.clips import ROUNDING_S, grid_length

if TYPE_CHECKING:
    from pipeline.records import ClipRules, EncodedVideo, TimeSpan

LATE_S = 0.5  # by which a span may exceed its video: frame counts over a rounded rate drift as much in ten minutes


class Place(NamedTuple):
    """Positions `[start, stop)` of the sampling grid that an annotated span covers."""

    span: int
    start: int
    stop: int
    warnings: tuple[str, ...] = ()


def place_spans(
    encoded: EncodedVideo, times_s: np.ndarray, end_s: float, rules: ClipRules
) -> tuple[list[Place], tuple[Reject, ...]]:
    """Places of the spans of a video in the order of their annotation, and a reject for each reason why others have none.

    `times_s` (float64) are the times of the shown frames from 0, `end_s` is the end of the last one, in seconds.
    """
    spans = encoded.time_spans
    places: list[Place] = []
    bad: list[str] = []
    outside: list[str] = []
    for number, span in enumerate(spans):
        if span.fault:
            bad.append(span.fault)
            continue
        start_s, stop_s = _seconds(span, times_s, end_s)
        if start_s < -ROUNDING_S or start_s >= end_s - ROUNDING_S or stop_s > end_s + LATE_S:
            outside.append(f"span {number} is {span.start:g} to {span.end:g} {span.unit}")
        else:
            late = stop_s - end_s
            warnings = (f"span_cut:{late:.3f}",) if late > ROUNDING_S else ()
            places.append(Place(number, *_positions(start_s, stop_s, times_s, end_s, rules.fps), warnings))
    rejects: list[Reject] = []
    key, uri = encoded.key, encoded.uri
    if not spans:
        text = f"no annotated spans: its metadata has no list {rules.spans_field!r}, and no row of a table has a start and an end"
        rejects.append(Reject(key, "clips", "no_spans", text, policy=True, uri=uri))
    if bad:
        text = f"{len(bad)} of {len(spans)} annotated spans cannot be used; the first: {bad[0]}"
        rejects.append(Reject(key, "clips", "bad_span", text, policy=False, uri=uri))
    if outside:
        text = (
            f"{len(outside)} of {len(spans)} annotated spans are not inside the video, which has {len(times_s)} frames and ends at "
            f"{end_s:.3f} s; the first: {outside[0]}"
        )
        rejects.append(Reject(key, "clips", "span_outside", text, policy=False, uri=uri))
    return places, tuple(rejects)


def _seconds(span: TimeSpan, times_s: np.ndarray, end_s: float) -> tuple[float, float]:
    if span.unit == "seconds":
        return span.start, span.end
    count = len(times_s)
    return _time(int(span.start), times_s, end_s / count, end_s), _time(int(span.end), times_s, end_s / count, end_s)


def _time(frame: int, times_s: np.ndarray, frame_s: float, end_s: float) -> float:
    count = len(times_s)
    if frame < 0:
        return frame * frame_s
    return float(times_s[frame]) if frame < count else end_s + (frame - count) * frame_s


def _positions(start_s: float, stop_s: float, times_s: np.ndarray, end_s: float, fps: float | None) -> tuple[int, int]:
    """The positions whose times are in `[start_s, stop_s)`, with the rounding that containers and annotations have."""
    whole = stop_s >= end_s - ROUNDING_S
    available = grid_length(len(times_s), end_s, fps)
    if fps is None:
        first, stop = np.searchsorted(times_s, [start_s - ROUNDING_S, stop_s - ROUNDING_S]).tolist()
    else:
        tolerance = min(ROUNDING_S, 0.25 / fps)
        first, stop = (max(0, math.ceil((time_s - tolerance) * fps)) for time_s in (start_s, stop_s))
    stop = available if whole else min(stop, available)
    return min(first, stop), stop

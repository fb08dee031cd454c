"""Repair of packet times: one ascending clock for a video whose own clock restarts, jumps or has gaps. Part of the decode package.

Takes times in decode order, as the container gives them. Returns times on which every segment follows the one before it.

A clock breaks at a keyframe earlier than what was decoded before it, at a packet earlier than all of the last `MOST_REORDERED`, and where
decode times fall (MPEG-TS, MPEG-PS, FLV). In MPEG streams a leap ahead of more than `LEAP_S` is a break too, as in players: recordings
leap when the signal is lost. In other containers a leap is a real gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_REORDERED = 16  # frames that may be decoded before one that is shown earlier (H.264, H.265)
LEAP_S = 10.0
MOST_BREAKS = 8  # or an eighth of the packets; a clock that breaks more often is unusable
LOOK_PACKETS = 2048  # searched for the next break; more if there is none in them
ALONE_AMONG = 4  # packets behind an outlier that must continue from before it
NO_TIME = -(2**63)


@dataclass(frozen=True, slots=True)
class Order:
    """Order of the times of a stream, from its codec and container."""

    reorders: bool  # frames may be shown in another order than decoded
    decode_times: bool  # decode times are stored in the container and never fall
    leap: int | None  # a step ahead of more ticks is a break; None: no step ahead is


def continue_clock(
    pts: np.ndarray, dts: np.ndarray, is_point: np.ndarray, order: Order
) -> tuple[np.ndarray, list[int]] | None:
    """Moves each segment behind the one before it.

    Args:
        pts: int64 in decode order, all known.
        dts: int64, `NO_TIME` if unknown.
        is_point: bool, packets before which everything decoded is shown earlier.
        order: of the stream.

    Returns:
        Times and the first packet of each further segment, or None if the clock breaks too often to be usable.
    """
    starts = [0]
    while (at := _next_break(pts, dts, is_point, order, starts[-1])) is not None:
        starts.append(at)
        if len(starts) > max(MOST_BREAKS, len(pts) // 8):
            return None
    ticks = pts.copy()
    bounds = [*starts, len(pts)]
    for n in range(1, len(starts)):
        previous, begin, end = bounds[n - 1 : n + 2]
        before = ticks[previous:begin]
        ticks[begin:end] += int(before.max()) + usual_gap(before) - int(pts[begin:end].min())
    return ticks, starts[1:]


def wild_times(pts: np.ndarray, leap: int) -> np.ndarray:
    """Positions of outliers: times more than `leap` ticks from those before and behind, if the times behind continue those before."""
    count = len(pts) - ALONE_AMONG - 1
    if count <= 0:
        return np.empty(0, np.int64)
    before, here = pts[:count].astype(np.float64), pts[1 : count + 1].astype(np.float64)  # hostile times overflow int64
    wild = np.abs(here - before) > leap
    for n in range(2, ALONE_AMONG + 2):
        after = pts[n : n + count].astype(np.float64)
        wild &= (np.abs(after - before) < leap) & (np.abs(after - here) > leap)
    return np.flatnonzero(wild) + 1


def usual_gap(ticks: np.ndarray) -> int:
    """Median distance of neighbouring times, in ticks; 1 if there are none."""
    gaps = np.diff(np.unique(ticks))
    return max(1, int(np.median(gaps))) if len(gaps) else 1


def spread(ticks: np.ndarray, end: int) -> np.ndarray:
    """Ascending times (float64) of non-descending `ticks`: equal ones are spread evenly up to the next one, the last ones up to `end`."""
    distinct, first, counts = np.unique(ticks, return_index=True, return_counts=True)
    gaps = np.diff(distinct, append=max(end, int(distinct[-1]) + 1))
    place = np.arange(len(ticks)) - np.repeat(first, counts)
    return np.repeat(distinct, counts) + place * np.repeat(gaps / counts, counts)


def fill_gaps(pts: np.ndarray) -> np.ndarray:
    """`pts` with missing times spread evenly between those of their neighbours. For streams without reordering."""
    known = np.flatnonzero(pts != NO_TIME)
    places = np.arange(len(pts))
    filled = np.round(np.interp(places, known, pts[known])).astype(np.int64)
    filled[known] = pts[known]  # exact: float64 does not hold every int64
    gap = usual_gap(pts[known])
    first, last = int(known[0]), int(known[-1])
    filled[:first] = pts[first] - gap * np.arange(first, 0, -1)
    filled[last + 1 :] = pts[last] + gap * np.arange(1, len(pts) - last)
    return filled


def _next_break(pts: np.ndarray, dts: np.ndarray, is_point: np.ndarray, order: Order, begin: int) -> int | None:
    """The first packet after `begin` that does not continue the segment that begins there."""
    look = LOOK_PACKETS
    while True:  # block by block: a recording may have a break every few seconds
        block = slice(begin, begin + look)
        found = _first_break(pts[block], dts[block], is_point[block], order)
        if found is not None:
            return begin + found
        if begin + look >= len(pts):
            return None
        look *= 2


def _first_break(own: np.ndarray, own_dts: np.ndarray, own_points: np.ndarray, order: Order) -> int | None:
    """The first packet that does not continue the segment that begins with packet 0."""
    highest, later = np.maximum.accumulate(own)[:-1], own[1:]
    back = later < highest
    broken = back & own_points[1:] if order.reorders else back
    if order.decode_times:
        known = (own_dts[1:] != NO_TIME) & (own_dts[:-1] != NO_TIME)
        broken |= known & (own_dts[1:] < own_dts[:-1])
    if order.leap is not None:
        broken |= later - highest > order.leap
    if order.reorders and len(own) > MOST_REORDERED + 1:
        window = MOST_REORDERED + 1
        lowest = own[: len(own) - window].copy()  # of `window` packets from each on
        for n in range(1, window):
            np.minimum(lowest, own[n : n + len(lowest)], out=lowest)
        broken[window - 1 :] |= own[window:] < lowest
    found = np.flatnonzero(broken)
    return 1 + int(found[0]) if len(found) else None

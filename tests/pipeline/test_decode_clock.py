"""Repair of clocks: segments follow each other, and times inside a segment keep their distances."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.video.decode.clock import NO_TIME, Order, continue_clock, fill_gaps, spread, usual_gap, wild_times

PLAIN = Order(reorders=False, decode_times=False, leap=None)
REORDERS = Order(reorders=True, decode_times=False, leap=None)
TRANSPORT = Order(reorders=True, decode_times=True, leap=900_000)


def segment(groups: int, start: int, gap: int, pyramid: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times of display and decoding, and keyframes, of groups of 9 frames: I P B B P B B P B."""
    order = np.array([0, 3, 1, 2, 6, 4, 5, 8, 7]) if pyramid else np.arange(9)
    pts = np.concatenate([start + gap * (order + 9 * n) for n in range(groups)])
    dts = start + gap * (np.arange(9 * groups) - 2)
    return pts, dts, np.arange(9 * groups) % 9 == 0


# Groups, how far the clock falls back behind the end of the segment before (in frames), frame duration, reordering.
segments = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 60), st.sampled_from([1, 40, 3600]), st.booleans()),
    min_size=1,
    max_size=5,
)


@given(segments, st.sampled_from([REORDERS, TRANSPORT]))
@settings(max_examples=200, deadline=None)
def test_segments_follow_each_other(parts, order):
    made: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    latest = 10_000_000
    for groups, back, gap, pyramid in parts:
        made.append(segment(groups, latest - back * gap, gap, pyramid))
        latest = int(made[-1][0].max())
    pts, dts, points = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
    ticks, starts = continue_clock(pts, dts, points, order)
    lengths = np.cumsum([len(part[0]) for part in made])
    assert starts == lengths[:-1].tolist()
    at = 0
    for part in made:
        own = ticks[at : at + len(part[0])]
        assert (np.diff(own - part[0]) == 0).all()
        assert at == 0 or own.min() > ticks[:at].max()
        at += len(part[0])


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.booleans())
def test_an_ascending_clock_is_not_changed(gaps, reorders):
    pts = np.cumsum(gaps)
    if reorders:
        pts = pts.copy()
        for n in range(0, len(pts) - 3, 4):  # a reference frame before the two that are shown before it
            pts[n + 1 : n + 4] = pts[[n + 3, n + 1, n + 2]]
    points = np.zeros(len(pts), bool)
    points[::4] = True
    ticks, starts = continue_clock(pts, np.full(len(pts), NO_TIME), points, REORDERS if reorders else PLAIN)
    assert starts == []
    assert np.array_equal(ticks, pts)


def test_a_clock_that_breaks_too_often_is_unusable():
    pts = np.random.default_rng(0).permutation(400)
    assert continue_clock(pts, np.full(400, NO_TIME), np.ones(400, bool), PLAIN) is None


def test_a_leap_ahead_is_a_gap_in_a_file_and_a_restart_in_a_transport_stream():
    pts = np.concatenate([np.arange(20) * 3600, 20 * 3600 + 90_000 * 3600 + np.arange(20) * 3600])
    points, unknown = np.zeros(40, bool), np.full(40, NO_TIME)
    assert continue_clock(pts, unknown, points, REORDERS)[1] == []
    ticks, starts = continue_clock(pts, unknown, points, TRANSPORT)
    assert starts == [20]
    assert np.array_equal(ticks, np.arange(40) * 3600)


def test_missing_times_lie_between_their_neighbours():
    big = 2**60
    pts = np.array([NO_TIME, 10, NO_TIME, NO_TIME, 40, 50, NO_TIME]) + np.array([0, big, 0, 0, big, big, 0])
    filled = fill_gaps(np.where(pts < 0, NO_TIME, pts))
    assert filled[[1, 4, 5]].tolist() == [big + 10, big + 40, big + 50]
    assert (np.diff(filled[[0, 1]]) > 0).all()
    assert (np.diff(filled[[5, 6]]) > 0).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_equal_times_are_spread_before_the_next(gaps):
    ticks = np.cumsum(gaps)
    times = spread(ticks, int(ticks[-1]) + 5)
    assert (np.diff(times) > 0).all()
    assert (times >= ticks).all()
    assert times[-1] < ticks[-1] + 5
    assert usual_gap(ticks) >= 1


def test_a_time_far_from_its_neighbours_is_an_outlier_and_a_gap_is_not():
    pts = np.arange(40) * 40
    assert wild_times(pts, 10_000).tolist() == []
    hostile = pts.copy()
    hostile[[7, 20]] = 2**62, -(2**61)
    assert wild_times(hostile, 10_000).tolist() == [7, 20]
    assert wild_times(np.concatenate([pts, pts + 60_000]), 10_000).tolist() == []  # a gap
    assert wild_times(np.array([0, 90_000]), 10_000).tolist() == []


def test_many_joined_recordings_get_one_clock():
    pts = np.tile(np.arange(48) * 3600, 3000)
    points = np.arange(len(pts)) % 48 == 0
    ticks, starts = continue_clock(pts, pts.copy(), points, TRANSPORT)
    assert len(starts) == 2999
    assert np.array_equal(ticks, np.arange(len(pts)) * 3600)

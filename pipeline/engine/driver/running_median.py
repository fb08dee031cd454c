"""Median of all values added so far; adding one costs O(log n)."""

from __future__ import annotations

import heapq


class RunningMedian:
    """The lower half is in one heap, the upper half in another."""

    def __init__(self) -> None:
        self._lower: list[float] = []  # negated
        self._upper: list[float] = []

    def add(self, value: float) -> None:
        """One more value."""
        heapq.heappush(self._upper, -heapq.heappushpop(self._lower, -value))
        if len(self._upper) > len(self._lower):
            heapq.heappush(self._lower, -heapq.heappop(self._upper))

    @property
    def value(self) -> float | None:
        """The median; None before the first value."""
        if not self._lower:
            return None
        return -self._lower[0] if len(self._lower) > len(self._upper) else (self._upper[0] - self._lower[0]) / 2

"""Counter of all work in one encode loop, which distinguishes a hang from slow work.

Takes amounts (bytes, chunks, steps) from any thread, and functions that read counters kept elsewhere. Gives one number that never shrinks,
and grows as long as anything is done. It has no unit: only whether it has changed matters.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class ProgressCounter:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._count = 0
        self._watched: list[Callable[[], int]] = []

    def add(self, amount: int = 1) -> None:
        """Counts work that was done."""
        with self._guard:
            self._count += amount

    def watch(self, read: Callable[[], int]) -> None:
        """Adds a counter kept elsewhere, which starts at 0 and never shrinks. `value` reads it."""
        with self._guard:
            self._watched.append(read)

    def unwatch(self, read: Callable[[], int]) -> None:
        """Reads it for the last time and keeps its count. A second call does nothing."""
        with self._guard:
            if read in self._watched:
                self._watched.remove(read)
                self._count += read()

    @property
    def value(self) -> int:
        """The sum now."""
        with self._guard:
            return self._count + sum(read() for read in self._watched)

"""Counter of everything that moves in one encode loop, so that a hang can be told from slow work.

Enters: amounts (bytes, chunks, steps), from any thread, and functions that read counters kept elsewhere. Leaves: one
number. It never shrinks, and it grows while anything moves. What it counts has no unit: only whether it changed matters.
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
        """Something moved."""
        with self._guard:
            self._count += amount

    def watch(self, read: Callable[[], int]) -> None:
        """Adds a counter kept elsewhere, which starts at 0 and never shrinks. It is read whenever `value` is."""
        with self._guard:
            self._watched.append(read)

    def unwatch(self, read: Callable[[], int]) -> None:
        """Reads it for the last time; what it has counted stays. A second call does nothing."""
        with self._guard:
            if read in self._watched:
                self._watched.remove(read)
                self._count += read()

    @property
    def value(self) -> int:
        """The sum now."""
        with self._guard:
            return self._count + sum(read() for read in self._watched)

"""Counters of a loader: what training waited for, what was read, what was replaced."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

NAMED = 100  # damaged tensors that are named


@dataclass(slots=True)
class LoaderStats:
    """`wait_s`: training waited for a batch. `read_s`: reading threads, together. `bytes`: of tensors, from the store. `taken_down`: rows
    that a takedown hides, replaced. `damaged`: rows whose bytes were not the recorded ones, replaced; `damage` names the first.
    `sidecars_missing`: rows that got zeros for a sidecar set; `sidecars_dropped`: rows that were left out for want of one.
    """

    batches: int = 0
    tensors: int = 0
    bytes: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    taken_down: int = 0
    damaged: int = 0
    sidecars_missing: int = 0
    sidecars_dropped: int = 0
    damage: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **values: float) -> None:
        """Adds to counters by name."""
        with self._lock:
            for name, value in values.items():
                setattr(self, name, getattr(self, name) + value)

    def add_damage(self, message: str) -> None:
        """Counts a damaged row and names it."""
        with self._lock:
            self.damaged += 1
            if len(self.damage) < NAMED:
                self.damage.append(message)

    def to_dict(self) -> dict[str, Any]:
        """Counters by name, as they are now."""
        with self._lock:
            found = {name: getattr(self, name) for name in self.__slots__ if not name.startswith("_")}
            return {**found, "damage": [*self.damage]}

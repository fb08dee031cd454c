"""Memory of batches that is used again: new memory of this size costs more than reading into it, because the kernel must clear its pages.

A block is given out as an array and comes back when that array and the last tensor made of it are gone. A user may therefore keep
batches; they are never overwritten. Pinned for CUDA.
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


class BatchMemory:
    """Blocks of bytes. `free_blocks`: most unused ones that are kept. Safe for several threads."""

    def __init__(self, *, pinned: bool, free_blocks: int) -> None:
        self._pinned = pinned
        self._free: deque[np.ndarray] = deque(maxlen=free_blocks)  # a full one lets the oldest go
        self._lent: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}  # by id of the reference
        self._came_back = _returning(self._lent, self._free)
        self.allocated = 0

    def take(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """An array, contents arbitrary. `torch.from_numpy` gives a tensor that holds it."""
        num_bytes = prod(shape) * kind.itemsize
        block = self._found(num_bytes)
        # Tensors and memoryviews hold this object. Views that NumPy makes of it do not: they hold the block.
        lent = block[:num_bytes].view(kind).reshape(shape)
        # A tenth of the time of `weakref.finalize`.
        reference = weakref.ref(lent, self._came_back)
        self._lent[id(reference)] = reference, block
        return lent

    def _found(self, num_bytes: int) -> np.ndarray:
        """A free block that fits and is not more than twice too large, or a new one. The one used last may be in the processor's cache."""
        for _ in range(len(self._free)):
            try:
                block = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if num_bytes <= len(block) <= 2 * num_bytes:
                return block
            self._free.appendleft(block)
        self.allocated += 1
        if self._pinned:
            import torch

            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(num_bytes, np.uint8)


def _returning(
    lent: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]], free: deque[np.ndarray]
) -> Callable[[weakref.ref[np.ndarray]], None]:
    """Called when a block is not used any more. Does not keep the `BatchMemory`, which goes at once when its loader does."""

    def came_back(reference: weakref.ref[np.ndarray]) -> None:
        free.append(lent.pop(id(reference))[1])

    return came_back

"""Which chunks go through the network together: up to B next chunks of different clips, alike in shape, with their carried states.

Enters: chunks of running clips, in any interleaving. Leaves: batches. Pure bookkeeping: no tensors are touched, no clock is read.
A batch never holds two chunks of one clip, and a clip's chunks leave in their order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.records import ChunkShape, FrameChunk

PATIENCE = 256  # chunks


@dataclass(eq=False, slots=True)
class ClipRun:
    """A clip on its way through the network: chunks that wait, and the causal state after those that went."""

    token: Any  # whose clip this is; opaque here
    waiting: deque[FrameChunk] = field(default_factory=deque)
    state: Any = None
    arrived: int = 0  # arrival number of the chunk at the head of `waiting`
    dropped: bool = False  # given up: what still comes out of the network for it is of no use


class Batcher:
    """Holds waiting chunks; `take` returns runs whose head chunks share a shape, oldest first."""

    def __init__(self, largest_batch: Callable[[ChunkShape], int]) -> None:
        self._largest_batch = largest_batch
        self._runs: dict[int, ClipRun] = {}
        self._clock = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: ClipRun, chunk: FrameChunk) -> None:
        """Queues the next chunk of `run`."""
        self._clock += 1
        self.nbytes += chunk.nbytes
        if not run.waiting:
            run.arrived = self._clock
            self._runs[id(run)] = run
        run.waiting.append(chunk)

    def drop(self, run: ClipRun) -> None:
        """Forgets what waits of `run`."""
        run.dropped = True
        self._runs.pop(id(run), None)
        self.nbytes -= sum(chunk.nbytes for chunk in run.waiting)
        run.waiting.clear()

    def take(self, *, full_only: bool = False) -> list[tuple[ClipRun, FrameChunk]]:
        """The next batch: a full group if there is one, else (unless `full_only`) the group with the oldest chunk.

        A chunk that has seen `PATIENCE` others arrive goes before any full group, so that odd shapes do not starve.
        """
        groups: dict[ChunkShape, list[ClipRun]] = {}
        for run in sorted(self._runs.values(), key=lambda run: run.arrived):
            groups.setdefault(run.waiting[0].shape, []).append(run)
        if not groups:
            return []
        oldest = next(iter(groups))
        full = next((shape for shape, runs in groups.items() if len(runs) >= self._size(shape)), None)
        starved = self._clock - groups[oldest][0].arrived > PATIENCE
        chosen = oldest if starved or (full is None and not full_only) else full
        return [] if chosen is None else [self._pop(run) for run in groups[chosen][: self._size(chosen)]]

    def _size(self, shape: ChunkShape) -> int:
        return max(1, self._largest_batch(shape))

    def _pop(self, run: ClipRun) -> tuple[ClipRun, FrameChunk]:
        chunk = run.waiting.popleft()
        self.nbytes -= chunk.nbytes
        if run.waiting:
            self._clock += 1
            run.arrived = self._clock
        else:
            del self._runs[id(run)]
        return run, chunk

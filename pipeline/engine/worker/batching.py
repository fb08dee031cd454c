"""Batches for the network: up to B chunks of one shape, each the next chunk of another clip.

Takes chunks of running clips in any order, gives batches. A batch never holds two chunks of one clip, and a clip's chunks keep their order.
No tensor is touched and no clock is read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.records import ChunkShape, FrameChunk

PATIENCE = 256  # chunks that may arrive after a waiting one before it goes first


@dataclass(eq=False, slots=True)
class ClipRun:
    """A clip that is being encoded: its waiting chunks, and the causal state after the chunks before them."""

    token: Any  # the clip's owner; opaque here
    waiting: deque[FrameChunk] = field(default_factory=deque)
    state: Any = None
    arrived: int = 0  # arrival number of the chunk at the head of `waiting`
    dropped: bool = False  # given up: latents that the network still gives for it are ignored
    apart: Any = None  # runs with another value never share a batch; see `BlamedVideo`


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
        """Removes the waiting chunks of `run`."""
        run.dropped = True
        self._runs.pop(id(run), None)
        self.nbytes -= sum(chunk.nbytes for chunk in run.waiting)
        run.waiting.clear()

    def take(self, *, full_only: bool = False) -> list[tuple[ClipRun, FrameChunk]]:
        """The next batch: a full group if there is one, else (unless `full_only`) the group with the oldest chunk.

        A chunk after which `PATIENCE` others have arrived goes before any full group, so that rare shapes are not delayed without limit.
        """
        groups: dict[tuple[ChunkShape, Any], list[ClipRun]] = {}
        for run in sorted(self._runs.values(), key=lambda run: run.arrived):
            groups.setdefault((run.waiting[0].shape, run.apart), []).append(run)
        if not groups:
            return []
        oldest = next(iter(groups))
        full = next((kind for kind, runs in groups.items() if len(runs) >= self._size(kind[0])), None)
        waited_long = self._clock - groups[oldest][0].arrived > PATIENCE
        chosen = oldest if waited_long or (full is None and not full_only) else full
        return [] if chosen is None else [self._pop(run) for run in groups[chosen][: self._size(chosen[0])]]

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

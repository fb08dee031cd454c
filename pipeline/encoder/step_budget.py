"""Chunks per step and frames per chunk, from measured memory. Plain arithmetic, no torch.

Takes the memory that steps used, and which did not fit; returns the largest step worth trying, per frame size. A step never
changes a latent, so only speed matters: enough pixels to keep the device busy, and no more than fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SAFE_SHARE = 0.7  # share of free memory for a step; states of clips and fragmentation need the rest


@dataclass(slots=True)
class StepBudget:
    """Budget of an encode step.

    `target`: pixel-frames that keep the device busy; more only adds latency. `fixed`: chunks per step, if the job sets them.
    `free_bytes`: returns the device's free memory; None if memory is not the limit (a CPU processes one video at a time).
    """

    target: int
    fixed: int | None = None
    free_bytes: Callable[[], int] | None = None
    # all in pixel-frames of a step, by frame size
    _measured: dict[tuple[int, int], int] = field(default_factory=dict)  # largest step
    _caps: dict[tuple[int, int], int] = field(default_factory=dict)  # just below a size that did not fit
    _cost: dict[tuple[int, int], float] = field(default_factory=dict)  # bytes per pixel-frame of the largest step
    _ran: dict[tuple[int, int, int], int] = field(default_factory=dict)  # most chunks that a step held

    def chunks(self, frames: int, height: int, width: int) -> int:
        """Most chunks of this shape per step. If memory is the limit, the first step is one chunk, which is measured."""
        pixels, size = frames * height * width, (height, width)
        most = self.fixed or max(1, self.target // pixels)
        limit = min(most * pixels, self._caps.get(size, most * pixels))
        if self.free_bytes is not None:
            if size not in self._cost:
                return 1
            # read every time, because clips in progress keep their states there
            limit = min(limit, int(SAFE_SHARE * self.free_bytes() / self._cost[size]))
        return max(1, min(most, limit // pixels))

    def too_long(self, frames: int, height: int, width: int) -> bool:
        """Whether a single chunk of this shape is known not to fit."""
        pixels = frames * height * width
        return pixels > self._caps.get((height, width), pixels)

    def ran(self, chunks: int, frames: int, height: int, width: int, peak_bytes: int, carried_bytes: int = 0) -> None:
        """Records a step that took `peak_bytes` (0: unknown); one that continues clips takes `carried_bytes` more.

        Bytes per pixel are taken from the largest step so far.
        """
        shape, size, pixels = (frames, height, width), (height, width), chunks * frames * height * width
        self._ran[shape] = max(chunks, self._ran.get(shape, 0))
        if self.free_bytes is None or not peak_bytes or pixels <= self._measured.get(size, 0):
            return
        self._measured[size] = pixels
        self._cost[size] = (peak_bytes + carried_bytes) / pixels

    def ran_out(self, chunks: int, frames: int, height: int, width: int) -> None:
        """Records that a step did not fit: next time half the chunks, or a shorter chunk if it was a single one."""
        pixels, size = frames * height * width, (height, width)
        cap = chunks // 2 * pixels if chunks > 1 else pixels - 1
        self._caps[size] = min(cap, self._caps.get(size, cap))

    def choices(self) -> dict[str, int]:
        """`frames x height x width` -> chunks per step, for shapes that ran."""
        return {"x".join(map(str, shape)): chunks for shape, chunks in sorted(self._ran.items())}

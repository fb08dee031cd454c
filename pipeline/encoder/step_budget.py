"""How much goes through the network at once: chunks a step, and frames of a chunk. Plain arithmetic, no torch.

Enters: what steps took of the device's memory, and which did not fit. Leaves: the largest step worth trying, remembered per frame size.
A step never changes a latent, so the only question is speed: enough pixels to keep the device busy, no more than fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SAFE_SHARE = 0.7  # of free memory a step may take; states that clips carry and fragmentation need the rest


@dataclass(slots=True)
class StepBudget:
    """See the module.

    `target` pixel frames keep the device busy; more only adds latency. `fixed` chunks a step, if the job says so. `free_bytes` asks the
    device; None where memory is not the limit (a CPU works one video at a time).
    """

    target: int
    fixed: int | None = None
    free_bytes: Callable[[], int] | None = None
    # all in pixel frames of a step, by frame size
    _measured: dict[tuple[int, int], int] = field(default_factory=dict)  # the largest step
    _caps: dict[tuple[int, int], int] = field(default_factory=dict)  # just below what once did not fit
    _cost: dict[tuple[int, int], float] = field(default_factory=dict)  # bytes per pixel frame, of that step
    _ran: dict[tuple[int, int, int], int] = field(default_factory=dict)  # most chunks a step really held

    def chunks(self, frames: int, height: int, width: int) -> int:
        """Chunks of this shape a step may hold. On a device with a memory to ask, the first step is one chunk, which is measured."""
        pixels, size = frames * height * width, (height, width)
        most = self.fixed or max(1, self.target // pixels)
        room = min(most * pixels, self._caps.get(size, most * pixels))
        if self.free_bytes is not None:
            if size not in self._cost:
                return 1
            # asked anew each time: clips under way keep their states there
            room = min(room, int(SAFE_SHARE * self.free_bytes() / self._cost[size]))
        return max(1, min(most, room // pixels))

    def too_long(self, frames: int, height: int, width: int) -> bool:
        """Whether one chunk of this shape is known not to fit."""
        pixels = frames * height * width
        return pixels > self._caps.get((height, width), pixels)

    def ran(self, chunks: int, frames: int, height: int, width: int, peak_bytes: int, carried_bytes: int = 0) -> None:
        """A step went through and took `peak_bytes` (0: unknown); one that continues clips takes `carried_bytes` more.

        The largest step measured is the one that is believed.
        """
        shape, size, pixels = (frames, height, width), (height, width), chunks * frames * height * width
        self._ran[shape] = max(chunks, self._ran.get(shape, 0))
        if self.free_bytes is None or not peak_bytes or pixels <= self._measured.get(size, 0):
            return
        self._measured[size] = pixels
        self._cost[size] = (peak_bytes + carried_bytes) / pixels

    def ran_out(self, chunks: int, frames: int, height: int, width: int) -> None:
        """A step did not fit: half the chunks next time, or a shorter chunk if it was one alone."""
        pixels, size = frames * height * width, (height, width)
        cap = chunks // 2 * pixels if chunks > 1 else pixels - 1
        self._caps[size] = min(cap, self._caps.get(size, cap))

    def choices(self) -> dict[str, int]:
        """`frames x height x width` -> chunks a step, for shapes that ran."""
        return {"x".join(map(str, shape)): chunks for shape, chunks in sorted(self._ran.items())}

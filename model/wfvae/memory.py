"""What one step through the network leaves for the next: numbered slots of tensors whose first axis is the batch.

Enters: the tensors of the step before, or None at the start of a video. Leaves: those for the step after. Frames are channel-last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Memory:
    """Slots read from the step before and written for the step after.

    Attributes:
        first: this step begins a video. last: it ends one, so nothing may be held back.
    """

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int, *, last: bool = True) -> None:
        self._past, self.first, self.last = past, past is None, last
        self._kept: list[torch.Tensor | None] = [None] * slots

    def take(self, slot: int) -> torch.Tensor | None:
        """What the step before left, or None at the start."""
        return None if self._past is None else self._past[slot]

    def keep(self, slot: int, tensor: torch.Tensor) -> None:
        """Leaves `tensor` for the step after. It is not copied and must not be written to any more."""
        self._kept[slot] = tensor

    def history(self, slot: int, x_BTHWC: torch.Tensor, frames: int) -> torch.Tensor | None:
        """The `frames` frames before x, and remembers the last ones up to the end of x."""
        past = self.take(slot)
        if x_BTHWC.shape[1] >= frames:
            self.keep(slot, owned(x_BTHWC[:, -frames:]))
        elif past is None:
            before = x_BTHWC[:, :1].expand(-1, frames - x_BTHWC.shape[1], -1, -1, -1)
            self.keep(slot, torch.cat([before, x_BTHWC], dim=1))
        else:
            self.keep(slot, torch.cat([past, x_BTHWC], dim=1)[:, -frames:].clone())
        return past

    def queued(self, slot: int, arrived_BTHWC: torch.Tensor, wanted: int) -> torch.Tensor:
        """The `wanted` oldest frames of what waited and what arrived; the others go on waiting."""
        waiting = self.take(slot)
        line = arrived_BTHWC if waiting is None else torch.cat([waiting, arrived_BTHWC], dim=1)
        self.keep(slot, owned(line[:, wanted:]))
        return line[:, :wanted]

    def kept(self) -> tuple[torch.Tensor, ...]:
        """The next step's tensors; every slot must have been written."""
        done = tuple(tensor for tensor in self._kept if tensor is not None)
        if len(done) != len(self._kept):
            raise RuntimeError(f"{len(self._kept) - len(done)} of {len(self._kept)} slots were left empty")
        return done


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory that holds nothing else, without a copy where that is so already."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)

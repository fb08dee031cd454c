"""State of one step: numbered slots of tensors, read from the previous step and written for the next. The first axis is the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class StreamState:
    """Slots of the previous step (None at the start of a video) and of the next.

    Attributes:
        first: this step begins a video. last: it ends one, so no frame may be held back.
    """

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int, *, last: bool = True) -> None:
        self._past, self.first, self.last = past, past is None, last
        self._saved: list[torch.Tensor | None] = [None] * slots

    def previous(self, slot: int) -> torch.Tensor | None:
        """Tensor that the previous step saved, or None at the start."""
        return None if self._past is None else self._past[slot]

    def save(self, slot: int, tensor: torch.Tensor) -> None:
        """Saves `tensor` for the next step. It is not copied: do not modify it in place afterwards."""
        self._saved[slot] = tensor

    def past_frames(self, slot: int, x_BTHWC: torch.Tensor, frames: int) -> torch.Tensor | None:
        """Returns the `frames` frames before x (None at the start), and saves the last `frames` up to the end of x."""
        past = self.previous(slot)
        if x_BTHWC.shape[1] >= frames:
            self.save(slot, own_memory(x_BTHWC[:, -frames:]))
        elif past is None:
            before = x_BTHWC[:, :1].expand(-1, frames - x_BTHWC.shape[1], -1, -1, -1)
            self.save(slot, torch.cat([before, x_BTHWC], dim=1))
        else:
            self.save(slot, torch.cat([past, x_BTHWC], dim=1)[:, -frames:].clone())
        return past

    def dequeue(self, slot: int, new_BTHWC: torch.Tensor, count: int) -> torch.Tensor:
        """Appends `new_BTHWC` to the slot's queue of frames, then removes and returns the oldest `count` frames."""
        waiting = self.previous(slot)
        queue = new_BTHWC if waiting is None else torch.cat([waiting, new_BTHWC], dim=1)
        self.save(slot, own_memory(queue[:, count:]))
        return queue[:, :count]

    def next_tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensors for the next step. Raises RuntimeError if a slot was not written."""
        done = tuple(tensor for tensor in self._saved if tensor is not None)
        if len(done) != len(self._saved):
            raise RuntimeError(f"{len(self._saved) - len(done)} of {len(self._saved)} slots were not written")
        return done


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory that holds nothing else; copied only if needed."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)

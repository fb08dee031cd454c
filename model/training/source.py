"""Clip sources of the trainer: clip number n is the same whenever and wherever it is requested.

So a resumed or distributed run has to remember only numbers of its data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Clip(NamedTuple):
    """Clip with its name."""

    key: str  # name for error messages
    video_CTHW: torch.Tensor  # uint8 RGB `3 T H W`, black 0, white 255

    def __repr__(self) -> str:
        return f"Clip({self.key!r}, {tuple(self.video_CTHW.shape)})"


class ClipSource(Protocol):
    """Endless numbered clips. Sources are pickled to data-loading processes; open files and the like are opened there."""

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """Clip number `index` (>= 0) with exactly `frames` frames of at least `height` x `width` pixels; one frame is an image.

        A pure function of the source and its arguments. Larger clips are cropped by the trainer.

        Raises:
            ValueError: a size that this source does not have.
        """
        ...

"""Where a trainer's clips come from: anything that can say what clip number n is.

Enters: a number and a size. Leaves: that clip, the same one whenever and wherever it is asked for. Numbers are all a resumed or a
distributed run has to remember of its data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from model.training.scenes.clips import clip as synthetic_clip

if TYPE_CHECKING:
    import torch


class Clip(NamedTuple):
    """A clip and its name."""

    key: str  # what an error message names
    video_CTHW: torch.Tensor  # uint8 RGB `3 T H W`, black 0, white 255


class ClipSource(Protocol):
    """Endless numbered clips. Sources travel to data-loading processes, so they pickle; what cannot (open files) is opened there."""

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """Clip number `index` (>= 0) with exactly so many frames, of at least `height` x `width` pixels; one frame is an image.

        A pure function of the source and its arguments. Where a clip is larger than asked for, the trainer cuts a random piece out.

        Raises:
            ValueError: a size this source cannot give.
        """
        ...


class SyntheticSource:
    """Clips of `model.training.scenes`; never runs out, never repeats."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """As `ClipSource.clip`; keys are `synthetic/SEED/INDEX`."""
        return Clip(f"synthetic/{self.seed}/{index}", synthetic_clip(self.seed, index, frames, height, width))

"""Synthetic videos as a source of training clips."""

from __future__ import annotations

from model.training.source import Clip
from pipeline.synthetic_videos.clips import clip as synthetic_clip


class SyntheticSource:
    """Clips of this package; endless and without repetition."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """As `ClipSource.clip`; keys are `synthetic/SEED/INDEX`."""
        return Clip(f"synthetic/{self.seed}/{index}", synthetic_clip(self.seed, index, frames, height, width))

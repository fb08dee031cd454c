"""Synthetic clips by seed and index: uint8 RGB `(3, T, H, W)`, 0 to 255.

A clip is a pure function of its arguments: all random numbers come from a PCG64 generator seeded with (seed, index). On one machine, with
the same versions of numpy and torch, the bits are the same in every process and for any number of threads. A clip consists of many small
operations, so many single-threaded workers (such as those of `torch.utils.data.DataLoader`) are the fastest way to many clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.synthetic_videos import optics, shot

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST = 16
"""Pixels of the smallest height or width."""

_CUT, _STATIC = 0.12, 0.06  # share of 17-frame clips with a cut, and share of clips without any change


def _check(seed: int, index: int, frames: int, height: int, width: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0; got seed {seed}, index {index}")
    if frames < 1 or height < SMALLEST or width < SMALLEST:
        raise ValueError(
            f"a clip needs at least 1 frame of {SMALLEST} x {SMALLEST}; got {frames} of {height} x {width}"
        )


def clip(seed: int, index: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Clip number `index` of the endless sequence `seed`: uint8 RGB `(3, frames, height, width)`, black 0, white 255.

    A clip of one frame is an image.

    Raises:
        ValueError: a negative seed or index, no frame, a side under 16 pixels.
    """
    _check(seed, index, frames, height, width)
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    moving = frames > 1 and rng.random() > _STATIC
    if moving and rng.random() < _CUT * min(frames / 17, 2):
        shown = _two_shots(rng, frames, height, width)
    else:
        shown = shot.render(rng, frames if moving else 1, height, width, moving=moving)
    shown = optics.develop(shown, rng, moving=moving)
    pixels = shown.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return pixels.expand(frames, -1, -1, -1).transpose(0, 1).contiguous()


def _two_shots(rng: np.random.Generator, frames: int, height: int, width: int) -> torch.Tensor:
    """Two consecutive shots, joined by a hard cut, a dissolve, or a fade through black."""
    at = int(rng.integers(1, frames))
    transition = rng.choice(["hard", "dissolve", "fade"], p=[0.6, 0.28, 0.12])
    long = 0 if transition == "hard" else int(rng.integers(2, max(frames, 4)))
    start, stop = max(at - long // 2, 0), min(at + (long + 1) // 2, frames)
    first = shot.render(rng, stop, height, width)
    second = shot.render(rng, frames - start, height, width)
    part = torch.arange(1, stop - start + 1, dtype=torch.float32)[:, None, None, None] / (stop - start + 1)
    before, after = first[start:], second[: stop - start]
    if transition == "dissolve":
        between = torch.lerp(before, after, part)
    else:
        between = before * (1 - 2 * part).clamp_(min=0) + after * (2 * part - 1).clamp_(min=0)
    return torch.cat([first[:start], between, second[stop - start :]])


@dataclass(frozen=True)
class SyntheticVideos:
    """Clips `start`, `start + stride`, `start + 2 stride`, ... of the sequence `seed`, without end.

    Rank r of n uses `start=r, stride=n`; to resume after k clips of a rank, `start=r + k * n`. Every iteration starts again.
    Items are those of `clip`.

    Raises:
        ValueError: on construction, for arguments that `clip` refuses or a stride below 1.
    """

    seed: int
    frames: int
    height: int
    width: int
    start: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        _check(self.seed, self.start, self.frames, self.height, self.width)
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1; got {self.stride}")

    def __iter__(self) -> Iterator[torch.Tensor]:
        index = self.start
        while True:
            yield clip(self.seed, index, self.frames, self.height, self.width)
            index += self.stride

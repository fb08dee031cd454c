"""Which clips to show, and which of their frames, chosen while they pass: the worst, the typical, the best.

Enters: scores, names, frames of originals and reconstructions. Leaves: a handful of pairs for `model.sheets`. What is kept is bounded: a
few clips of a few frames each, shrunk, whatever the corpus and the clips' lengths.
"""

from __future__ import annotations

import bisect
import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from model.sheets import shown_frames

KEPT_FRAMES = 9  # an odd number, so that halving keeps the first and goes on evenly
SAMPLE = 33  # clips the typical ones are taken from; of a corpus no larger than this it is the true middle
LARGEST = 384  # pixels of a kept picture's longer side


class Shown(NamedTuple):
    """A clip kept for the sheet."""

    score: float
    name: str  # its own among all clips
    title: str
    original_CTHW: torch.Tensor  # uint8, a few frames
    other_CTHW: torch.Tensor


class Reel:
    """At most nine frames of a clip of any length, evenly spread from the first on: when full, every other one goes."""

    def __init__(self) -> None:
        self._stride, self._seen = 1, 0
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """The next frames, uint8 `3 T H W` of both."""
        for t in range(original_CTHW.shape[1]):
            if self._seen % self._stride == 0:
                if len(self._kept) == KEPT_FRAMES:
                    self._kept, self._stride = self._kept[::2], self._stride * 2
                if self._seen % self._stride == 0:
                    self._kept.append((_small(original_CTHW[:, t]), _small(other_CTHW[:, t])))
            self._seen += 1

    def frames(self, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """At most `count` frames of both, `3 t h w`. Raises ValueError where none were added."""
        if not self._kept:
            raise ValueError("a reel without a frame shows nothing; add frames first")
        chosen = [self._kept[i] for i in shown_frames(len(self._kept), count)]
        return torch.stack([a for a, _ in chosen], dim=1), torch.stack([b for _, b in chosen], dim=1)


class Showcase:
    """The `count` lowest and highest scores of all clips offered, and those in the middle of a sample of them.

    The sample are the clips whose names hash lowest: the same ones in whatever order they come.
    """

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._worst: list[tuple[float, str, Shown]] = []
        self._best: list[tuple[float, str, Shown]] = []
        self._sample: list[tuple[str, str, Shown]] = []

    def offer(self, score: float, name: str, title: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        """A clip under a name of its own, higher scores being better."""
        shown = Shown(score, name, title, *pair)
        _keep(self._worst, (score, name, shown), self._count)
        _keep(self._best, (-score, name, shown), self._count)
        _keep(self._sample, (hashlib.blake2b(name.encode("utf-8", "surrogatepass")).hexdigest(), name, shown), SAMPLE)

    def chosen(self) -> list[tuple[str, Shown]]:
        """("worst" | "median" | "best", clip), each clip once, from the worst to the best; where there are few clips, fewer."""
        ranked = sorted((item for _, _, item in self._sample), key=lambda item: (item.score, item.name))
        middle = max(0, (len(ranked) - self._count + 1) // 2)
        rows = [("worst", [item for _, _, item in self._worst])]
        rows += [("median", ranked[middle : middle + self._count])]
        rows += [("best", [item for _, _, item in reversed(self._best)])]
        taken: set[str] = set()
        found = []
        for label, row in rows:
            for item in row:
                if item.name not in taken:
                    taken.add(item.name)
                    found.append((label, item))
        return found


def _keep(kept: list[Any], entry: tuple[Any, str, Shown], most: int) -> None:
    """Into a list sorted by its first two entries, which are never alike twice; the last one falls out."""
    bisect.insort(kept, entry, key=lambda item: item[:2])
    del kept[most:]


def _small(picture_CHW: torch.Tensor) -> torch.Tensor:
    """On the CPU, its longer side at most `LARGEST`."""
    _, height, width = picture_CHW.shape
    if max(height, width) <= LARGEST:
        return picture_CHW.cpu().clone()
    scale = LARGEST / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    smaller = F.interpolate(picture_CHW[None].float(), size=size, mode="bilinear", antialias=True)
    return smaller[0].round().clamp(0, 255).to("cpu", torch.uint8)

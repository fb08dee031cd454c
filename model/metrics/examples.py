"""Selects example clips and their frames for the picture sheet while clips are measured: worst, median, best.

Memory is bounded whatever the corpus: a few clips with a few reduced frames each.
"""

from __future__ import annotations

import bisect
import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from model.sheets import shown_frames

KEPT_FRAMES = 9  # odd, so that dropping every other frame keeps the first and even spacing
SAMPLE = 33  # clips the median ones are taken from; exact for a corpus of at most this many clips
LARGEST = 384  # longer side of a kept frame in pixels


class Example(NamedTuple):
    """Clip kept for the sheet."""

    score: float
    name: str  # unique among all clips
    title: str
    original_CTHW: torch.Tensor  # uint8, a few frames
    other_CTHW: torch.Tensor

    def __repr__(self) -> str:
        return f"Example({self.score:.4g}, {self.name!r}, {tuple(self.original_CTHW.shape)})"


class FrameSampler:
    """At most nine frames of a clip of any length, evenly spaced from the first: when full, every other frame is dropped."""

    def __init__(self) -> None:
        self._stride, self._seen = 1, 0
        self._frames: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """Adds the next frames, uint8 `3 T H W` of both."""
        for t in range(original_CTHW.shape[1]):
            if self._seen % self._stride == 0:
                if len(self._frames) == KEPT_FRAMES:
                    self._frames, self._stride = self._frames[::2], self._stride * 2
                if self._seen % self._stride == 0:
                    self._frames.append((_small(original_CTHW[:, t]), _small(other_CTHW[:, t])))
            self._seen += 1

    def frames(self, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """At most `count` frames of both, `3 t h w`. Raises ValueError if no frames were added."""
        if not self._frames:
            raise ValueError("got no frames; add frames before reading them")
        chosen = [self._frames[i] for i in shown_frames(len(self._frames), count)]
        return torch.stack([a for a, _ in chosen], dim=1), torch.stack([b for _, b in chosen], dim=1)


class ExampleSelection:
    """Clips with the `count` lowest and highest scores of all offered, and the median ones of a sample.

    The sample holds the clips whose names have the lowest hashes, so it does not depend on the order of clips.
    """

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._worst: list[tuple[float, str, Example]] = []
        self._best: list[tuple[float, str, Example]] = []
        self._sample: list[tuple[str, str, Example]] = []

    def offer(self, score: float, name: str, title: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Offers a clip under a unique name; higher scores are better."""
        shown = Example(score, name, title, *pair)
        _keep(self._worst, (score, name, shown), self._count)
        _keep(self._best, (-score, name, shown), self._count)
        _keep(self._sample, (hashlib.blake2b(name.encode("utf-8", "surrogatepass")).hexdigest(), name, shown), SAMPLE)

    def chosen(self) -> list[tuple[str, Example]]:
        """("worst" | "median" | "best", clip), each clip once, from worst to best; fewer if there are few clips."""
        ranked = sorted((item for _, _, item in self._sample), key=lambda item: (item.score, item.name))
        middle = max(0, (len(ranked) - self._count + 1) // 2)
        rows = [("worst", [item for _, _, item in self._worst])]
        rows += [("median", ranked[middle : middle + self._count])]
        rows += [("best", [item for _, _, item in reversed(self._best)])]
        taken: set[str] = set()
        selected = []
        for label, row in rows:
            for item in row:
                if item.name not in taken:
                    taken.add(item.name)
                    selected.append((label, item))
        return selected


def _keep(entries: list[Any], entry: tuple[Any, str, Example], most: int) -> None:
    """Inserts into a list sorted by its first two fields, which are unique, and drops entries beyond `most`."""
    bisect.insort(entries, entry, key=lambda item: item[:2])
    del entries[most:]


def _small(picture_CHW: torch.Tensor) -> torch.Tensor:
    """Frame on the CPU, reduced to a longer side of at most `LARGEST`."""
    _, height, width = picture_CHW.shape
    if max(height, width) <= LARGEST:
        return picture_CHW.cpu().clone()
    scale = LARGEST / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    smaller = F.interpolate(picture_CHW[None].float(), size=size, mode="bilinear", antialias=True)
    return smaller[0].round().clamp(0, 255).to("cpu", torch.uint8)

"""Qualities of many clips, summed up as they come, in memory that does not grow with their number.

Enters: `ClipQuality`. Leaves: a JSON-ready summary. A clip counts once whatever its length (means of PSNR, SSIM and LPIPS are means over
clips); the preservation degree divides sums over all pixels of all clips, and the SSIM by position averages over all frames at a position,
as their papers define them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model.evaluation.fidelity import MOST_DB

if TYPE_CHECKING:
    from model.evaluation.fidelity import ClipQuality

BIN_DB = 0.5  # of the histogram, from 0 to `MOST_DB`
LONGEST_CURVE = 512  # frames of the curve over time; later ones count elsewhere only


class Spread:
    """Mean, deviation and range of numbers, one at a time (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self._m2 = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, value: float, times: int = 1) -> None:
        """One more number, or the same one `times` times."""
        self.count += times
        delta = value - self.mean
        self.mean += delta * times / self.count
        self._m2 += times * delta * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)

    def summary(self) -> dict[str, float] | None:
        """mean, std (of the population), min and max; None where nothing was added."""
        if not self.count:
            return None
        deviation = math.sqrt(self._m2 / self.count)
        return {"mean": self.mean, "std": deviation, "min": self.least, "max": self.most}


class Tally:
    """Everything known about a set of clips."""

    def __init__(self) -> None:
        self.clips = self.frames = 0
        self._spreads = {name: Spread() for name in ("psnr", "psnr_of_mse", "ssim", "lpips")}
        self._error = self._light = 0.0
        self._positions: list[Spread] = []
        self._curve: list[Spread] = []
        self._bins = [0] * (int(MOST_DB / BIN_DB) + 1)

    def add(self, quality: ClipQuality) -> None:
        """One more clip."""
        self.clips += 1
        self.frames += quality.frames
        for name, spread in self._spreads.items():
            if (value := getattr(quality, name)) is not None:
                spread.add(value)
        self._error += quality.error_sum
        self._light += quality.light_sum
        _add_each(self._positions, quality.ssim_positions, times=quality.groups)
        _add_each(self._curve, quality.frame_psnr[:LONGEST_CURVE])
        self._bins[max(0, int(quality.psnr / BIN_DB))] += 1

    def summary(self) -> dict[str, Any]:
        """JSON-ready. `ssim_margin` is the largest difference between positions (IV-VAE supplement, table 5)."""
        positions = [spread.mean for spread in self._positions]
        return {
            "clips": self.clips,
            "frames": self.frames,
            **{name: spread.summary() for name, spread in self._spreads.items()},
            "degree": 1 - self._error / self._light if self._light else None,
            "ssim_by_position": positions,
            "ssim_margin": max(positions) - min(positions) if positions else None,
            "psnr_by_frame": [spread.mean for spread in self._curve],
            "psnr_histogram": {f"{i * BIN_DB:g}": count for i, count in enumerate(self._bins) if count},
        }


def _add_each(spreads: list[Spread], values: tuple[float, ...], times: int = 1) -> None:
    for index, value in enumerate(values):
        if index == len(spreads):
            spreads.append(Spread())
        spreads[index].add(value, times)

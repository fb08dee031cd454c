"""Summary of the qualities of many clips, accumulated in memory that does not grow with their number.

Every clip counts once, whatever its length (means of PSNR, SSIM and LPIPS are over clips). The preservation degree divides sums over all
pixels of all clips, and SSIM by position averages over all frames at a position, as their papers define them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model.metrics.frames import MOST_DB

if TYPE_CHECKING:
    from model.metrics.fidelity import ClipQuality

BIN_DB = 0.5  # bin width of the histogram, which spans 0 to `MOST_DB`
LONGEST_CURVE = 512  # frames of the curve over time; later frames are left out of it


class RunningStatistics:
    """Running mean, deviation and range of numbers (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self._m2 = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, value: float, times: int = 1) -> None:
        """Adds a number `times` times."""
        self.count += times
        delta = value - self.mean
        self.mean += delta * times / self.count
        self._m2 += times * delta * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)

    def summary(self) -> dict[str, float] | None:
        """mean, std (of the population), min and max; None if nothing was added."""
        if not self.count:
            return None
        deviation = math.sqrt(self._m2 / self.count)
        return {"mean": self.mean, "std": deviation, "min": self.least, "max": self.most}


class QualitySummary:
    """Accumulated qualities of a set of clips."""

    def __init__(self) -> None:
        self.clips = self.frames = 0
        self._statistics = {name: RunningStatistics() for name in ("psnr", "psnr_of_mse", "ssim", "lpips")}
        self._error = self._light = 0.0
        self._positions: list[RunningStatistics] = []
        self._curve: list[RunningStatistics] = []
        self._bins = [0] * (int(MOST_DB / BIN_DB) + 1)

    def add(self, quality: ClipQuality) -> None:
        """Adds a clip."""
        self.clips += 1
        self.frames += quality.frames
        for name, statistics in self._statistics.items():
            if (value := getattr(quality, name)) is not None:
                statistics.add(value)
        self._error += quality.error_sum
        self._light += quality.light_sum
        _add_each(self._positions, quality.ssim_positions, times=quality.groups)
        _add_each(self._curve, quality.frame_psnr[:LONGEST_CURVE])
        self._bins[max(0, int(quality.psnr / BIN_DB))] += 1

    def summary(self) -> dict[str, Any]:
        """JSON-ready. `ssim_margin` is the largest difference between positions (IV-VAE supplement, table 5)."""
        positions = [statistics.mean for statistics in self._positions]
        return {
            "clips": self.clips,
            "frames": self.frames,
            **{name: statistics.summary() for name, statistics in self._statistics.items()},
            "degree": 1 - self._error / self._light if self._light else None,
            "ssim_by_position": positions,
            "ssim_margin": max(positions) - min(positions) if positions else None,
            "psnr_by_frame": [statistics.mean for statistics in self._curve],
            "psnr_histogram": {f"{i * BIN_DB:g}": count for i, count in enumerate(self._bins) if count},
        }


def _add_each(statistics: list[RunningStatistics], values: tuple[float, ...], times: int = 1) -> None:
    for index, value in enumerate(values):
        if index == len(statistics):
            statistics.append(RunningStatistics())
        statistics[index].add(value, times)

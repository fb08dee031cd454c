"""Histogram of measured qualities, such as PSNR of frames in dB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.values import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

BINS = 16


def quality_histogram(name: str, unit: str, values: Iterable[float]) -> Histogram | None:
    """Counts in `BINS` equal steps from the least to the greatest value; None without values."""
    found = np.array(list(values), np.float64)
    if not found.size:
        return None
    counts, edges = np.histogram(found, BINS)
    labels = tuple(f"{edge:.3g}" for edge in edges[:-1])
    return Histogram(name, unit, labels, {"frames": tuple(map(int, counts))})

"""Histograms of `lathe stats` as a picture: one panel per channel, one line per bucket. Needs matplotlib (the `training` extra)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, OutputError

COLUMNS = 4


def plot_statistics(found: dict[str, Any], path: str) -> None:
    """Writes the picture of one fingerprint of `statistics` to a local file whose suffix matplotlib knows.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'lathe[training]'") from error
    edges = np.array(found["bin_edges"])
    rows = math.ceil(len(edges) / COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, COLUMNS, squeeze=False)).ravel()
    for channel, panel in enumerate(panels):
        if channel >= len(edges):
            panel.set_axis_off()
            continue
        middle = (edges[channel, 1:] + edges[channel, :-1]) / 2
        width = edges[channel, 1] - edges[channel, 0]
        for bucket, item in found["buckets"].items():
            counts = np.array(item["histogram"][channel])
            panel.plot(middle, counts / max(counts.sum(), 1) / width, label=bucket, linewidth=1)
        mean, std = found["exact"]["mean"][channel], found["exact"]["std"][channel]
        panel.set_title(f"channel {channel}: {mean:.3g} ± {std:.3g}", fontsize=8)
        panel.tick_params(labelsize=6)
    panels[0].legend(fontsize=6)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"--plot {path}: cannot be written: {error}; name a local .png, .svg or .pdf file") from error

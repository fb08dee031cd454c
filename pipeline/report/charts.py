"""Charts of the report as SVG: bars, histograms of channels, lines. Plain geometry; colours come from the style sheet of the page.

Each takes numbers and labels and gives `Markup`. Labels are escaped. A chart is an image for screen readers, with its title; the page has a
table of the same numbers beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 380, 200  # of a chart, in units of its own
LEFT, BOTTOM, TOP = 48, 44, 12
SMALL_WIDTH, SMALL_HEIGHT = 200, 76  # of the histogram of a channel
LETTER = 7  # width of one in a label, at most
LABELS = 8  # most positions along an axis


def bars(title: str, labels: Sequence[str], series: Mapping[str, Sequence[int]], unit: str) -> Markup:
    """Groups of bars, one group for each label, one bar for each series."""
    top = max((value for values in series.values() for value in values), default=0) or 1
    step = (WIDTH - LEFT) / max(1, len(labels))
    width = step * 0.8 / max(1, len(series))
    plot = HEIGHT - BOTTOM - TOP
    parts = [_axes(top)]
    for number, values in enumerate(series.values()):
        for place, value in enumerate(values):
            height = plot * value / top
            x = LEFT + place * step + step * 0.1 + number * width
            parts.append(_bar(f"s{number}", x, HEIGHT - BOTTOM - height, width, height))
    widest = max(map(len, labels), default=0) * LETTER + LETTER
    every = max(1, math.ceil(len(labels) * widest / (WIDTH - LEFT)))
    for place, label in enumerate(labels):
        if place % every == 0:
            parts.append(_text(LEFT + (place + 0.5) * step, HEIGHT - BOTTOM + 16, label, "middle"))
    parts.append(_text((WIDTH + LEFT) / 2, HEIGHT - 6, unit, "middle"))
    return _svg(title, WIDTH, HEIGHT, parts, "chart")


def line(title: str, values: Sequence[float], unit: str) -> Markup:
    """Values at positions 0, 1, 2 …, from the least to the greatest of them."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.1 or 0.05
    low, high = low - pad, high + pad
    plot, step = HEIGHT - BOTTOM - TOP, (WIDTH - LEFT) / max(1, len(values))
    points = [
        (LEFT + (place + 0.5) * step, HEIGHT - BOTTOM - plot * (value - low) / (high - low))
        for place, value in enumerate(values)
    ]
    parts = [
        _rule("axis", LEFT, HEIGHT - BOTTOM, WIDTH, HEIGHT - BOTTOM),
        _text(LEFT - 6, HEIGHT - BOTTOM, f"{low:.3f}", "end"),
        _text(LEFT - 6, TOP + 10, f"{high:.3f}", "end"),
        Markup('<polyline class="l0" points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y in points)),
    ]
    every = -(-len(values) // LABELS)
    for place, (x, y) in enumerate(points):
        parts.append(Markup('<circle class="s0" cx="{}" cy="{}" r="4"/>').format(f"{x:.1f}", f"{y:.1f}"))
        if place % every == 0:
            parts.append(_text(x, HEIGHT - BOTTOM + 16, str(place), "middle"))
    parts.append(_text((WIDTH + LEFT) / 2, HEIGHT - 6, unit, "middle"))
    return _svg(title, WIDTH, HEIGHT, parts, "chart")


def channel(title: str, edges: Sequence[float], counts: Sequence[int], lines: Mapping[str, float | None]) -> Markup:
    """Histogram of one channel. `lines`: class of the style sheet -> value at which a vertical line stands."""
    top = max(counts, default=0) or 1
    step = SMALL_WIDTH / max(1, len(counts))
    parts = [
        _bar("s0", place * step, SMALL_HEIGHT * (1 - count / top), step, SMALL_HEIGHT * count / top)
        for place, count in enumerate(counts)
        if count
    ]
    low, high = edges[0], edges[-1]
    for name, value in lines.items():
        if value is not None and low <= value <= high:
            x = SMALL_WIDTH * (value - low) / ((high - low) or 1)
            parts.append(_rule(name, x, 0, x, SMALL_HEIGHT))
    parts.append(_rule("axis", 0, SMALL_HEIGHT, SMALL_WIDTH, SMALL_HEIGHT))
    return _svg(title, SMALL_WIDTH, SMALL_HEIGHT, parts, "small")


def _axes(top: float) -> Markup:
    return Markup("").join(
        (
            _rule("axis", LEFT, HEIGHT - BOTTOM, WIDTH, HEIGHT - BOTTOM),
            _text(LEFT - 6, HEIGHT - BOTTOM, "0", "end"),
            _text(LEFT - 6, TOP + 10, f"{top:,.6g}", "end"),
        )
    )


def _svg(title: str, width: int, height: int, parts: Iterable[Markup], kind: str) -> Markup:
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(kind, width, height, title)
    return head + Markup("").join(parts) + Markup("</svg>")


def _bar(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    return Markup(f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{max(height, 0):.2f}"/>')


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>')


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

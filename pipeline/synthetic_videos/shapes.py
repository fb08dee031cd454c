"""Outlines of leaves as signed distances in pixels, negative inside, at pixel coordinates from the centre.

Discs, ellipses, polygons, rounded boxes, blobs and bent strokes stand for objects, their fragments, stems and cables.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

_CHANCES = {"disc": 0.1, "ellipse": 0.2, "polygon": 0.25, "box": 0.2, "blob": 0.15, "stroke": 0.1}
KINDS = tuple(_CHANCES)


@dataclass(frozen=True)
class Shape:
    """Outline: `radius` is half its longest extent in pixels, `aspect` short side over long side, `angle` in radians.

    `roundness` rounds the corners of a box, `bend` curves a stroke, `waves` are the radii of a blob's first harmonics or the directions
    of a polygon's sides.
    """

    kind: str
    radius: float
    aspect: float
    angle: float
    roundness: float
    bend: float
    waves: np.ndarray = field(repr=False)


@lru_cache(maxsize=64)
def _odds(kinds: tuple[str, ...]) -> list[float]:
    """Upper end of each kind's share of [0, 1]."""
    whole = sum(_CHANCES[kind] for kind in kinds)
    return list(accumulate(_CHANCES[kind] / whole for kind in kinds))


def random_shape(rng: np.random.Generator, radius: float, kinds: tuple[str, ...] = KINDS) -> Shape:
    """Random shape of a kind among `kinds`, with `radius` pixels."""
    chance, narrow, leaning, turn, roundness = rng.random(5).tolist()
    kind = kinds[min(bisect(_odds(kinds), chance), len(kinds) - 1)]
    tilt, bend = rng.standard_normal(2).tolist()
    aspect = 1.0 if kind == "disc" else 0.02 + 0.1 * narrow if kind == "stroke" else 0.25 + 0.75 * narrow
    if kind == "polygon":
        sides = int(rng.integers(3, 8))
        waves = (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) * (2 * np.pi / sides)
    else:
        waves = rng.normal(0, 0.12, (2, 4)) if kind == "blob" else np.zeros(0)
    # horizontal and vertical outlines are more frequent than oblique ones (Coppola et al. 1998)
    angle = int(4 * turn) * (np.pi / 2) + 0.04 * tilt if leaning < 0.45 else 2 * np.pi * turn
    return Shape(kind, radius, aspect, angle, roundness, 0.35 * bend, waves)


def _disc(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - shape.radius


def _ellipse(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    # exact on the outline, approximate near it, enough for an edge a few pixels wide
    a, b = shape.radius, shape.radius * shape.aspect
    rho = np.hypot(x / a, y / b)
    return rho * (rho - 1) / (np.hypot(x / a**2, y / b**2) + 1e-6)


def _polygon(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = y / shape.aspect
    sides = [np.float32(np.cos(side)) * x + np.float32(np.sin(side)) * y for side in shape.waves]
    sides.append(np.hypot(x, y) - 0.4 * shape.radius)  # limits corners to the radius
    return (np.maximum.reduce(sides) - 0.6 * shape.radius) * shape.aspect**0.5


def _box(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    a = shape.radius / np.sqrt(1 + shape.aspect**2)  # the radius is that of a sharp corner
    b = a * shape.aspect
    corner = shape.roundness**2 * b
    across, down = np.abs(x) - (a - corner), np.abs(y) - (b - corner)
    outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
    return outside + np.minimum(np.maximum(across, down), 0) - corner


def _blob(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = y / shape.aspect
    turn = np.arctan2(y, x)
    radius = np.full_like(turn, 0.75)
    for order, (cosine, sine) in enumerate(shape.waves.T, start=2):
        radius += np.float32(cosine) * np.cos(order * turn) + np.float32(sine) * np.sin(order * turn)
    return (np.hypot(x, y) - shape.radius * np.clip(radius, 0.1, 1)) * shape.aspect**0.5


def _stroke(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = y - shape.bend * (x * x / shape.radius - 0.3 * shape.radius)
    slope = 2 * shape.bend * x / shape.radius
    beyond = np.maximum(np.abs(x) - shape.radius * 0.9, 0)
    return np.hypot(beyond, y / np.sqrt(1 + slope * slope)) - max(shape.radius * shape.aspect, 0.5)


_DISTANCES: dict[str, Callable[[Shape, np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "ellipse": _ellipse,
    "polygon": _polygon,
    "box": _box,
    "blob": _blob,
    "stroke": _stroke,
}


def signed_distance(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance in pixels from the outline, negative inside; float32, in the broadcast shape of `y` and `x` (pixels from the centre)."""
    cosine, sine = np.float32(np.cos(shape.angle)), np.float32(np.sin(shape.angle))
    return _DISTANCES[shape.kind](shape, cosine * y - sine * x, cosine * x + sine * y).astype(np.float32, copy=False)


def coverage(distance: np.ndarray, softness: float) -> np.ndarray:
    """Share of a pixel inside the outline, in [0, 1], for an edge `softness` pixels wide (a smooth step)."""
    step = np.clip(0.5 - distance / np.float32(max(softness, 1e-3)), 0, 1)
    return step * step * (3 - 2 * step)

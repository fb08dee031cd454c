"""Painting of leaves onto a canvas: a shape with colour, texture and shading.

The dead leaves model (Matheron 1968; Lee, Mumford and Huang 2001), opaque shapes with sizes falling as r^-3 that cover each other, has the
scale invariance, edges and heavy tails of natural images. A canvas is float32 `(4, h, w)`: RGB times opacity, and opacity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.synthetic_videos import fields, shapes

if TYPE_CHECKING:
    from pipeline.synthetic_videos.colours import Palette

_PATTERNS = ("plain", "noise", "detail", "grating", "stripes", "checker")


@dataclass(frozen=True)
class Materials:
    """Appearance of the leaves of one scene: colours, texture sheets, amount of texture, softness of edges, direction of light,
    and the share of small leaves with the colour of what they cover (`kinship`).
    """

    palette: Palette
    sheets: tuple[np.ndarray, ...] = field(
        repr=False
    )  # float32 (h, w), mean 0, deviation 1; repeated if smaller than a leaf
    texture: float
    softness: float
    light: float
    kinship: float


def empty(height: int, width: int) -> np.ndarray:
    """Empty canvas: `(4, height, width)` zeros."""
    return np.zeros((4, height, width), np.float32)


def radii(rng: np.random.Generator, count: int, smallest: float, largest: float) -> np.ndarray:
    """Random radii with density r^-3 between `smallest` and `largest` (Lee, Mumford and Huang 2001, section 4)."""
    low, high = float(smallest) ** -2, float(max(largest, smallest)) ** -2
    return (low - rng.random(count) * (low - high)) ** -0.5


def random_materials(rng: np.random.Generator, palette: Palette, size: int, edge: float) -> Materials:
    """Random materials for a canvas `size` pixels wide whose sharpest edges are `edge` pixels wide."""
    side = 96 if size < 300 else 192
    sheets = [fields.power_field(rng, (side, side), rng.uniform(0.6, 1.6)) for _ in range(2)]
    sheets.append(_detail(rng, side))
    softness = edge * float(np.exp(abs(rng.normal(0, 0.3))))
    return Materials(
        palette,
        tuple(sheets),
        float(np.exp(rng.normal(-2.9, 0.7))),
        softness,
        rng.uniform(0, 2 * np.pi),
        rng.uniform(0.3, 1),
    )


def _detail(rng: np.random.Generator, side: int) -> np.ndarray:
    """Texture sheet of leaves too small to paint one by one: grey leaves at twice the size, then halved."""
    sheet = fields.power_field(rng, (2 * side, 2 * side), 1.2)
    for radius in radii(rng, 70, 3, side / 2):
        shape = shapes.random_shape(rng, float(radius))
        _blend(sheet[None], shape, rng.uniform(0, 2 * side, 2), 1.5, float(rng.normal()), 0.3)
    halved = sheet.reshape(side, 2, side, 2).mean((1, 3))
    return (halved - halved.mean()) / (halved.std() + np.float32(1e-6))


def _blend(
    canvas: np.ndarray, shape: shapes.Shape, centre: np.ndarray, softness: float, grey: float, keep: float
) -> None:
    """Paints a flat grey shape on `canvas`, which keeps the share `keep` of the texture below."""
    window = _window(canvas, shape.radius + softness, centre)
    if window is None:
        return
    patch, y, x = window
    mask = shapes.coverage(shapes.signed_distance(shape, y, x), softness)
    patch += mask * (np.float32(grey) - np.float32(1 - keep) * patch)


def _window(canvas: np.ndarray, reach: float, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Part of `canvas` within `reach` of `centre` (row, column), and its coordinates from the centre; None if it is outside."""
    height, width = canvas.shape[-2:]
    top, left = max(int(centre[0] - reach), 0), max(int(centre[1] - reach), 0)
    bottom, right = min(int(centre[0] + reach) + 2, height), min(int(centre[1] + reach) + 2, width)
    if bottom <= top or right <= left:
        return None
    y = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - centre[0]))[:, None]
    x = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - centre[1]))[None, :]
    return canvas[..., top:bottom, left:right], y, x


def paint(
    rng: np.random.Generator, canvas: np.ndarray, shape: shapes.Shape, centre: np.ndarray, materials: Materials
) -> None:
    """Paints one leaf on `canvas` with its centre at `centre` (row, column, in pixels)."""
    softness = materials.softness
    window = _window(canvas, shape.radius * 1.1 + softness, centre)
    if window is None:
        return
    patch, y, x = window
    mask = shapes.coverage(shapes.signed_distance(shape, y, x), softness)
    if shape.radius < 6 * softness:  # too small for visible texture
        colour = materials.palette.draw(rng)
        middle = patch[:, patch.shape[1] // 2, patch.shape[2] // 2]
        if middle[3] > 0.99 and rng.random() < materials.kinship:  # similar to the colour below
            colour = materials.palette.vary(rng, middle[:3])
        patch[:3] += mask * (colour[:, None, None] - patch[:3])
    else:
        patch[:3] += mask * (surface(rng, y, x, shape.radius, materials) - patch[:3])
    patch[3] += mask * (1 - patch[3])


def surface(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, radius: float, materials: Materials) -> np.ndarray:
    """Colours of a leaf with `radius` pixels at coordinates `y`, `x` from its centre: float32 `(3, h, w)`."""
    palette = materials.palette
    colour, tint = palette.draw(rng), palette.tint(rng)
    direction = materials.light + rng.normal(0, 0.6)
    strength = rng.normal(0, 0.3) / radius
    shade = 1 + np.float32(strength * np.cos(direction)) * x + np.float32(strength * np.sin(direction)) * y
    if rng.random() < 0.3:  # round: darker towards the rim
        shade = shade * (1 - np.float32(rng.uniform(0.1, 0.6) / radius**2) * (x * x + y * y))
    amount = materials.texture * float(np.exp(rng.normal(0, 0.6)))
    relief = pattern(rng, y, x, radius, materials)
    if relief is None:
        return np.clip(colour[:, None, None] * shade, 0, 1)
    return np.clip(colour[:, None, None] * shade + (tint * np.float32(amount))[:, None, None] * relief, 0, 1)


def pattern(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, radius: float, materials: Materials
) -> np.ndarray | None:
    """Texture with deviation about 1 at the coordinates, or None for a plain leaf."""
    kind = _PATTERNS[int(np.searchsorted([0.3, 0.6, 0.85, 0.91, 0.96], rng.random()))]
    if kind == "plain":
        return None
    if kind in ("noise", "detail"):
        sheet = materials.sheets[2 if kind == "detail" else int(rng.integers(2))]
        zoom = float(rng.choice([1.0, 1.0, 2.0]))
        rows = ((y[:, 0] / zoom).astype(np.int64) + rng.integers(sheet.shape[0])) % sheet.shape[0]
        columns = ((x[0] / zoom).astype(np.int64) + rng.integers(sheet.shape[1])) % sheet.shape[1]
        return sheet[rows][:, columns]
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    period = np.float32(np.exp(rng.uniform(np.log(5), np.log(max(radius, 8)))))
    wave = np.sin(along * (2 * np.pi / period))
    if kind == "grating":
        return 1.4 * wave
    edge = period / np.float32(np.pi * materials.softness)  # as wide as the leaf's own edges
    if kind == "checker":
        across = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
        wave = wave * np.sin(across * (2 * np.pi / period))
    return 2 * np.clip(wave * edge, -1, 1)

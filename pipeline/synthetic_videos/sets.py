"""Elements of a scene at rest, as float32 canvases; sizes in canvas pixels.

A ground fills its canvas `(3, h, w)`; ridges, layers of leaves, objects and letters are canvases `(4, h, w)`: RGB times opacity,
and opacity.
"""

from __future__ import annotations

import numpy as np

from pipeline.synthetic_videos import fields, leaves, lettering, shapes
from pipeline.synthetic_videos.colours import AXES, Palette

SHARPEST = 1.2
"""Width in canvas pixels of the sharpest edge: about one pixel of the frame."""


def ground(rng: np.random.Generator, materials: leaves.Materials, height: int, width: int, size: float) -> np.ndarray:
    """Background of the scene `(3, height, width)`: sky, colour field, wall, or leaves on leaves. `size`: extent of the largest object."""
    kind = rng.random()
    if kind < 0.05:
        base = np.broadcast_to(materials.palette.draw(rng)[:, None, None], (3, height, width)).copy()
    elif kind < 0.3:
        base = sky(rng, materials.palette, height, width)
    else:
        base = colour_field(rng, materials.palette, height, width)
    if kind < 0.1:
        return base
    canvas = np.concatenate([base, np.ones((1, height, width), np.float32)])
    if kind > 0.25:
        scatter(rng, canvas, materials, int(rng.integers(4, 16)), 0.12 * size, 0.45 * size)
        scatter(rng, canvas, materials, int(np.exp(rng.uniform(np.log(15), np.log(250)))), 2.5, 0.3 * size)
    else:
        scatter(rng, canvas, materials, int(rng.integers(1, 40)), 2.5, 0.2 * size)
    return canvas[:3]


def sky(rng: np.random.Generator, palette: Palette, height: int, width: int) -> np.ndarray:
    """Smooth gradient between two or three colours, mostly from top to bottom, with faint clouds: `(3, height, width)`."""
    plane = fields.ramp(rng, height, width, np.pi / 2 + rng.normal(0, 0.15) if rng.random() < 0.75 else None)
    stops = np.stack([palette.draw(rng) for _ in range(3)])
    positions = [-1.0, rng.uniform(-0.5, 0.5), 1.0]
    shown = np.stack([np.interp(plane, positions, stops[:, channel]) for channel in range(3)]).astype(np.float32)
    cloud = fields.power_field(rng, (height, width), rng.uniform(1.2, 2.0))
    return shown + np.float32(np.exp(rng.normal(-4.5, 1.0))) * cloud


def colour_field(rng: np.random.Generator, palette: Palette, height: int, width: int) -> np.ndarray:
    """1/f field of brightness with weaker fields of hue, around one palette colour: `(3, height, width)`."""
    exponent = rng.uniform(1.0, 1.8)
    spread = rng.uniform(0.03, 0.2) * np.array([1.7, 0.25 * palette.saturation, 0.12 * palette.saturation])
    shown = np.broadcast_to(palette.draw(rng)[:, None, None], (3, height, width)).copy()
    for axis, amount in zip(AXES.T, spread.astype(np.float32), strict=True):
        if amount > 0:
            shown += (axis * amount)[:, None, None] * fields.power_field(rng, (height, width), exponent)
    return shown


def scatter(
    rng: np.random.Generator,
    canvas: np.ndarray,
    materials: leaves.Materials,
    count: int,
    smallest: float,
    largest: float,
) -> None:
    """Paints `count` leaves at random places of the canvas, sizes falling as r^-3."""
    height, width = canvas.shape[-2:]
    kinds = shapes.KINDS if rng.random() < 0.6 else tuple(rng.permutation(shapes.KINDS)[:2].tolist())
    places = rng.uniform(-0.1, 1.1, (count, 2))
    if count > 8 and rng.random() < 0.5:  # in groups
        groups = rng.uniform(0, 1, (int(rng.integers(1, 7)), 2))
        joining = rng.random(count) < 0.7
        places[joining] = groups[rng.integers(0, len(groups), joining.sum())] + rng.normal(0, 0.12, (joining.sum(), 2))
    for radius, place in zip(leaves.radii(rng, count, smallest, largest), places, strict=True):
        centre = place * (height, width)
        leaves.paint(rng, canvas, shapes.random_shape(rng, float(radius), kinds), centre, materials)


def ridge(rng: np.random.Generator, materials: leaves.Materials, height: int, width: int) -> np.ndarray:
    """Everything below a rough horizon: hills, a roof line, the edge of a table."""
    rough = fields.power_field(rng, (1, width), rng.uniform(1.0, 2.2))[0] * rng.uniform(0, 0.08) * height
    horizon = height * rng.uniform(0.3, 0.85) + rng.normal(0, 0.1) * (np.arange(width) - width / 2) + rough
    y = np.arange(height, dtype=np.float32)[:, None]
    mask = shapes.coverage(horizon[None].astype(np.float32) - y, materials.softness * 1.3)
    x = np.arange(width, dtype=np.float32)[None] - np.float32(width / 2)
    canvas = np.concatenate(
        [leaves.surface(rng, y - np.float32(height / 2), x, height / 2, materials), np.ones_like(mask)[None]]
    )
    if rng.random() < 0.6:
        scatter(rng, canvas, materials, int(np.exp(rng.uniform(np.log(5), np.log(120)))), 2.5, 0.1 * height)
    return canvas * mask


def clump(rng: np.random.Generator, materials: leaves.Materials, radius: float) -> np.ndarray:
    """One object on a canvas just large enough: a clump of 1 to 8 leaves, later ones smaller and on top of the first."""
    side = int(2.3 * radius + 4 * materials.softness) + 2
    canvas = leaves.empty(side, side)
    count = 1 + int(rng.integers(0, 8)) * int(rng.random() < 0.6)
    for number in range(count):
        part = radius if number == 0 else radius * rng.uniform(0.08, 0.5)
        centre = side / 2 + (0 if number == 0 else rng.normal(0, 0.35 * radius, 2).clip(-0.6 * radius, 0.6 * radius))
        leaves.paint(rng, canvas, shapes.random_shape(rng, float(part)), np.zeros(2) + centre, materials)
    return canvas


def letters(rng: np.random.Generator, palette: Palette, height: float, widest: int) -> np.ndarray:
    """Line of text, sometimes on a band or with a dark outline."""
    mask = lettering.lettering(rng, height, widest)
    bright = rng.random() < 0.75
    ink = np.full(3, 0.95 if bright else 0.05, np.float32) if rng.random() < 0.7 else palette.draw(rng)
    canvas = np.concatenate([ink[:, None, None] * mask, mask[None]])
    style = rng.random()
    if style < 0.6:
        return canvas
    backing = np.ones_like(mask) if style < 0.75 else np.clip(_dilated(mask), 0, 1)
    backing = backing * np.float32(rng.uniform(0.4, 1.0))
    shade = np.full(3, 0.05 if bright else 0.9, np.float32)
    under = np.concatenate([shade[:, None, None] * backing, backing[None]])
    return canvas + (1 - mask) * under


def _dilated(mask: np.ndarray) -> np.ndarray:
    """The mask, dilated by two pixels."""
    padded = np.pad(mask, 2)
    rows = np.maximum.reduce([padded[:, i : i + mask.shape[1]] for i in range(5)])
    return np.maximum.reduce([rows[i : i + mask.shape[0]] for i in range(5)])

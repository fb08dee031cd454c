"""What a scene is built of, before anything moves. Enters: a generator and sizes in canvas pixels. Leaves: canvases, float32.

A ground fills its canvas `(3, h, w)`; ridges, layers of leaves, things and letters are canvases `(4, h, w)`: RGB times opacity, and
opacity.
"""

from __future__ import annotations

import numpy as np

from model.training.scenes import fields, leaves, lettering, shapes
from model.training.scenes.colours import AXES, Palette

SHARPEST = 1.2
"""Width in canvas pixels of the sharpest edge: about one pixel of the frame."""


def ground(rng: np.random.Generator, made_of: leaves.Materials, height: int, width: int, size: float) -> np.ndarray:
    """The back of the scene `(3, height, width)`: sky, colour field, wall, or leaves on leaves. `size` is the largest thing's extent."""
    manner = rng.random()
    if manner < 0.05:
        base = np.broadcast_to(made_of.palette.draw(rng)[:, None, None], (3, height, width)).copy()
    elif manner < 0.3:
        base = sky(rng, made_of.palette, height, width)
    else:
        base = colour_field(rng, made_of.palette, height, width)
    if manner < 0.1:
        return base
    canvas = np.concatenate([base, np.ones((1, height, width), np.float32)])
    if manner > 0.25:
        scatter(rng, canvas, made_of, int(rng.integers(4, 16)), 0.12 * size, 0.45 * size)
        scatter(rng, canvas, made_of, int(np.exp(rng.uniform(np.log(15), np.log(250)))), 2.5, 0.3 * size)
    else:
        scatter(rng, canvas, made_of, int(rng.integers(1, 40)), 2.5, 0.2 * size)
    return canvas[:3]


def sky(rng: np.random.Generator, palette: Palette, height: int, width: int) -> np.ndarray:
    """A smooth gradient between two or three colours, mostly from top to bottom, with a trace of cloud: `(3, height, width)`."""
    plane = fields.ramp(rng, height, width, np.pi / 2 + rng.normal(0, 0.15) if rng.random() < 0.75 else None)
    stops = np.stack([palette.draw(rng) for _ in range(3)])
    places = [-1.0, rng.uniform(-0.5, 0.5), 1.0]
    shown = np.stack([np.interp(plane, places, stops[:, channel]) for channel in range(3)]).astype(np.float32)
    cloud = fields.power_field(rng, (height, width), rng.uniform(1.2, 2.0))
    return shown + np.float32(np.exp(rng.normal(-4.5, 1.0))) * cloud


def colour_field(rng: np.random.Generator, palette: Palette, height: int, width: int) -> np.ndarray:
    """A 1/f field of brightness with weaker fields of hue, about one palette colour: `(3, height, width)`."""
    exponent = rng.uniform(1.0, 1.8)
    spread = rng.uniform(0.03, 0.2) * np.array([1.7, 0.25 * palette.saturation, 0.12 * palette.saturation])
    shown = np.broadcast_to(palette.draw(rng)[:, None, None], (3, height, width)).copy()
    for axis, amount in zip(AXES.T, spread.astype(np.float32), strict=True):
        if amount > 0:
            shown += (axis * amount)[:, None, None] * fields.power_field(rng, (height, width), exponent)
    return shown


def scatter(
    rng: np.random.Generator, canvas: np.ndarray, made_of: leaves.Materials, count: int, smallest: float, largest: float
) -> None:
    """Paints `count` leaves anywhere on the canvas, sizes falling as r^-3."""
    height, width = canvas.shape[-2:]
    kinds = shapes.KINDS if rng.random() < 0.6 else tuple(rng.permutation(shapes.KINDS)[:2].tolist())
    places = rng.uniform(-0.1, 1.1, (count, 2))
    if count > 8 and rng.random() < 0.5:  # in groups
        groups = rng.uniform(0, 1, (int(rng.integers(1, 7)), 2))
        joining = rng.random(count) < 0.7
        places[joining] = groups[rng.integers(0, len(groups), joining.sum())] + rng.normal(0, 0.12, (joining.sum(), 2))
    for radius, place in zip(leaves.radii(rng, count, smallest, largest), places, strict=True):
        centre = place * (height, width)
        leaves.paint(rng, canvas, shapes.random_shape(rng, float(radius), kinds), centre, made_of)


def ridge(rng: np.random.Generator, made_of: leaves.Materials, height: int, width: int) -> np.ndarray:
    """Everything under a rough horizon: hills, a roof line, a table's edge."""
    rough = fields.power_field(rng, (1, width), rng.uniform(1.0, 2.2))[0] * rng.uniform(0, 0.08) * height
    horizon = height * rng.uniform(0.3, 0.85) + rng.normal(0, 0.1) * (np.arange(width) - width / 2) + rough
    y = np.arange(height, dtype=np.float32)[:, None]
    mask = shapes.coverage(horizon[None].astype(np.float32) - y, made_of.softness * 1.3)
    x = np.arange(width, dtype=np.float32)[None] - np.float32(width / 2)
    canvas = np.concatenate(
        [leaves.surface(rng, y - np.float32(height / 2), x, height / 2, made_of), np.ones_like(mask)[None]]
    )
    if rng.random() < 0.6:
        scatter(rng, canvas, made_of, int(np.exp(rng.uniform(np.log(5), np.log(120)))), 2.5, 0.1 * height)
    return canvas * mask


def thing(rng: np.random.Generator, made_of: leaves.Materials, radius: float) -> np.ndarray:
    """One thing on a canvas just large enough: a clump of 1 to 8 leaves, the later ones smaller and on the first."""
    side = int(2.3 * radius + 4 * made_of.softness) + 2
    canvas = leaves.empty(side, side)
    count = 1 + int(rng.integers(0, 8)) * int(rng.random() < 0.6)
    for number in range(count):
        part = radius if number == 0 else radius * rng.uniform(0.08, 0.5)
        centre = side / 2 + (0 if number == 0 else rng.normal(0, 0.35 * radius, 2).clip(-0.6 * radius, 0.6 * radius))
        leaves.paint(rng, canvas, shapes.random_shape(rng, float(part)), np.zeros(2) + centre, made_of)
    return canvas


def letters(rng: np.random.Generator, palette: Palette, height: float, widest: int) -> np.ndarray:
    """A line of text, some of it on a band or with a dark rim."""
    mask = lettering.lettering(rng, height, widest)
    bright = rng.random() < 0.75
    ink = np.full(3, 0.95 if bright else 0.05, np.float32) if rng.random() < 0.7 else palette.draw(rng)
    canvas = np.concatenate([ink[:, None, None] * mask, mask[None]])
    manner = rng.random()
    if manner < 0.6:
        return canvas
    behind = np.ones_like(mask) if manner < 0.75 else np.clip(_grown(mask), 0, 1)
    behind = behind * np.float32(rng.uniform(0.4, 1.0))
    shade = np.full(3, 0.05 if bright else 0.9, np.float32)
    under = np.concatenate([shade[:, None, None] * behind, behind[None]])
    return canvas + (1 - mask) * under


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its surroundings of two pixels."""
    wide = np.pad(mask, 2)
    rows = np.maximum.reduce([wide[:, i : i + mask.shape[1]] for i in range(5)])
    return np.maximum.reduce([rows[i : i + mask.shape[0]] for i in range(5)])

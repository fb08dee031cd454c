"""Synthetic moving images for the sample corpus.

A scene maps a random generator, height and width to a function from seconds to an RGB image, uint8 `H W 3`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Draw = Callable[[float], np.ndarray]
Scene = Callable[[np.random.Generator, int, int], Draw]


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y, x in [0, 1] along the longer side, float32 `HW`."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y / max(height, width), x / max(height, width)


def _palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` colours of different hues, float32 `count x 3` in [0, 255]."""
    hue = (rng.random() + np.arange(count) / count)[:, None] + np.array([0, 1 / 3, 2 / 3])
    return (128 + 110 * np.cos(2 * np.pi * hue)).astype(np.float32)


def _colour(red: int, green: int, blue: int) -> np.ndarray:
    return np.array([red, green, blue], dtype=np.float32)


def _blend(mask_HW: np.ndarray, over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """`over` where the mask is 1, `under` where it is 0."""
    return under + mask_HW[..., None] * (over - under)


def _to_uint8(rgb_HW3: np.ndarray) -> np.ndarray:
    return np.clip(rgb_HW3, 0, 255).astype(np.uint8)


def plasma(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Interfering waves: only gradients."""
    y, x = _grid(height, width)
    colours = _palette(rng, 2)
    angles = rng.uniform(0, 2 * np.pi, 3)
    waves = [(14 + 9 * n) * (x * np.cos(a) + y * np.sin(a)) for n, a in enumerate(angles)]

    def draw(seconds: float) -> np.ndarray:
        total = sum(np.sin(wave + seconds * (1.5 + n)) for n, wave in enumerate(waves))
        return _to_uint8(_blend(0.5 + total / 6, colours[0], colours[1]))

    return draw


def discs(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Shaded balls bouncing in front of a gradient: fast motion and occlusion."""
    y, x = _grid(height, width)
    colours = _palette(rng, 4)
    backdrop = _blend(np.clip(0.2 + y, 0, 1), colours[3] * 0.4, colours[3])
    speed, phase = rng.uniform(0.25, 0.7, (3, 2)), rng.uniform(0, 2, (3, 2))
    longer = max(height, width)
    high, wide = height / longer, width / longer

    def draw(seconds: float) -> np.ndarray:
        rgb = backdrop.copy()
        for n in range(3):
            radius = 0.09 + 0.03 * n
            position = np.abs((speed[n] * seconds + phase[n]) % 2 - 1) * (high, wide)  # back and forth
            top, left = (int(max(0, (coordinate - radius) * longer)) for coordinate in position)
            box = slice(top, top + int(2 * radius * longer) + 2), slice(left, left + int(2 * radius * longer) + 2)
            down, across = y[box] - np.float32(position[0]), x[box] - np.float32(position[1])
            light = np.clip(1.25 - np.hypot(down + 0.03, across + 0.03) / (radius + 0.03), 0.2, 1.2)
            edge = np.clip((1 - np.hypot(down, across) / radius) * 24, 0, 1)
            rgb[box] = _blend(edge, light[..., None] * colours[n], rgb[box])
        return _to_uint8(rgb)

    return draw


def rings(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Rings moving outward from a wandering point: fine detail of rising frequency."""
    y, x = _grid(height, width)
    colours = _palette(rng, 2)
    centre = rng.uniform(0.25, 0.45, 2)

    def draw(seconds: float) -> np.ndarray:
        distance = np.hypot(y - centre[0] - 0.05 * np.sin(seconds), x - centre[1] - 0.05 * np.cos(seconds))
        wave = 0.5 + 0.5 * np.sin(60 * distance - 5 * seconds) * np.exp(-2 * distance)
        return _to_uint8(_blend(wave, colours[0], colours[1]))

    return draw


def clouds(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Two layers of scrolling noise over a sky: texture and parallax."""
    y, _ = _grid(height, width)
    sky = _blend(np.clip(y * 1.3, 0, 1), _colour(236, 190, 150), _colour(70, 110, 190))
    layers = [_noise(rng, height, width, octaves) for octaves in (4, 6)]

    def draw(seconds: float) -> np.ndarray:
        rgb = sky
        for n, layer in enumerate(layers):
            shift = round(seconds * (20 + 30 * n))
            mask = np.clip(np.roll(layer, shift, axis=1) * 2.2 - 0.9, 0, 0.85)
            rgb = _blend(mask, _colour(250, 246, 240) - 30 * n, rgb)
        return _to_uint8(rgb)

    return draw


def _noise(rng: np.random.Generator, height: int, width: int, octaves: int) -> np.ndarray:
    """Smooth periodic noise in [0, 1], float32 `HW`."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = 3 * 2**octave
        lattice = rng.random((cells, cells)).astype(np.float32)
        rows, columns = (np.arange(size, dtype=np.float32) * cells / size for size in (height, width))
        total += _interpolate(_interpolate(lattice, rows).T, columns).T / 2**octave
    return (total - total.min()) / (total.max() - total.min())


def _interpolate(lattice: np.ndarray, at: np.ndarray) -> np.ndarray:
    low = at.astype(int) % len(lattice)
    weight = (at % 1)[:, None]
    weight = weight * weight * (3 - 2 * weight)
    return lattice[low] * (1 - weight) + lattice[(low + 1) % len(lattice)] * weight


def checker(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Rotating and pulsating checkerboard: hard edges."""
    y, x = _grid(height, width)
    colours = _palette(rng, 2)
    turn = rng.uniform(0.15, 0.4)

    def draw(seconds: float) -> np.ndarray:
        angle, scale = turn * seconds, 26 * (1 + 0.15 * np.sin(seconds))
        u = scale * ((x - 0.4) * np.cos(angle) + (y - 0.3) * np.sin(angle))
        v = scale * ((y - 0.3) * np.cos(angle) - (x - 0.4) * np.sin(angle))
        board = 0.5 + 0.5 * np.tanh(9 * np.sin(u) * np.sin(v))
        return _to_uint8(_blend(board, colours[0], colours[1] * (0.6 + 0.4 * y[..., None])))

    return draw


SCENES: dict[str, Scene] = {"plasma": plasma, "discs": discs, "rings": rings, "clouds": clouds, "checker": checker}

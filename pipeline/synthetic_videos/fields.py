"""Random fields with a natural frequency spectrum: float32 arrays of zero mean.

The amplitude of natural images falls about as 1/f (power 1/f^2: Field 1987; Ruderman and Bialek 1994), also in time (Dong and
Atick 1995). A field is white noise shaped in the Fourier domain, so it is periodic.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@lru_cache(maxsize=64)
def _frequency(shape: tuple[int, ...], steepness: tuple[float, ...]) -> np.ndarray:
    """Squared distance from zero frequency for `rfftn` of `shape`, in cycles per field along the longest axis; read-only."""
    longest = max(shape)
    squares = np.zeros((1,) * len(shape), np.float32)
    for axis, (length, weight) in enumerate(zip(shape, steepness, strict=True)):
        line = np.fft.rfftfreq(length) if axis == len(shape) - 1 else np.fft.fftfreq(length)
        layout = [1] * len(shape)
        layout[axis] = -1
        squares = squares + ((weight * longest * line) ** 2).astype(np.float32).reshape(layout)
    squares[(0,) * len(shape)] = np.inf  # no mean
    squares.flags.writeable = False
    return squares


def power_field(
    rng: np.random.Generator, shape: Sequence[int], exponent: float, steepness: Sequence[float] | None = None
) -> np.ndarray:
    """Gaussian field of `shape` whose amplitude falls as 1/f^`exponent`: float32, mean 0, standard deviation 1.

    `steepness` scales the frequency axes: a larger number means less change along that axis. Axes of length 1 are allowed.
    """
    size = tuple(int(length) for length in shape)
    squares = _frequency(size, tuple(steepness) if steepness is not None else (1.0,) * len(size))
    white = rng.standard_normal(size, dtype=np.float32)
    shaped = np.fft.rfftn(white) * squares ** np.float32(-exponent / 2)
    field = np.fft.irfftn(shaped, s=size, axes=tuple(range(len(size)))).astype(np.float32)
    return field / max(float(field.std()), 1e-12)


def ramp(rng: np.random.Generator, height: int, width: int, tilt: float | None = None) -> np.ndarray:
    """Plane from -1 to 1 across the field at a random angle, or at `tilt` radians from horizontal: float32 `(height, width)`."""
    angle = rng.uniform(0, 2 * np.pi) if tilt is None else tilt
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    plane = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    return plane / np.float32(abs(np.cos(angle)) + abs(np.sin(angle)))


def wander(rng: np.random.Generator, moments: np.ndarray, period: float, channels: int = 1) -> np.ndarray:
    """Smooth random curves over time, standard deviation about 1: float64 `(len(moments), channels)`.

    Each is a sum of three sines with periods around `period`, defined at any moment, also between frames.
    """
    periods = period * np.exp(rng.uniform(-0.7, 0.7, (3, channels)))
    phases = rng.uniform(0, 2 * np.pi, (3, channels))
    heights = rng.normal(0, np.sqrt(2 / 3), (3, channels))
    angles = 2 * np.pi * moments[:, None, None] / periods + phases
    return (heights * np.sin(angles)).sum(1)

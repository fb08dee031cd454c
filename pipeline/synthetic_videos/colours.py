"""Colours of scenes: RGB in [0, 1], float32.

In natural images red, green and blue vary together: colours spread several times wider along the achromatic axis than along
blue-yellow, and least along red-green (Buchsbaum and Gottschalk 1983; Ruderman, Cronin and Chiao 1998). A scene has few hues, and
sometimes a vivid object.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# columns: achromatic, blue-yellow, red-green; orthonormal
AXES = np.array(
    [[1 / 3**0.5, 1 / 6**0.5, 1 / 2**0.5], [1 / 3**0.5, 1 / 6**0.5, -1 / 2**0.5], [1 / 3**0.5, -2 / 6**0.5, 0]],
    np.float32,
)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Palette:
    """Colours of one scene: `colours_N3` to draw from, `saturation` of texture and hue, `vivid` the share of arbitrary colours."""

    colours_N3: np.ndarray = field(repr=False)
    saturation: float
    vivid: float

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Random colour `(3,)`: similar to one of the palette, or arbitrary."""
        if rng.random() < self.vivid:
            return rng.random(3, dtype=np.float32) ** np.float32(0.7)
        return self.vary(rng, self.colours_N3[rng.integers(len(self.colours_N3))])

    def vary(self, rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
        """Variation of a colour `(3,)`: lighter or darker, with a slightly shifted hue."""
        shift = rng.normal(0, 1, 3).astype(np.float32) * np.array([0.13, 0.04, 0.02], np.float32)
        shift[1:] *= self.saturation
        return np.clip(colour * np.float32(np.exp(rng.normal(0, 0.25))) + AXES @ shift, 0, 1)

    def tint(self, rng: np.random.Generator) -> np.ndarray:
        """Direction `(3,)` in which a texture changes colour: nearly achromatic, length 1."""
        direction = np.array(
            [1, rng.normal(0, 0.12 * self.saturation), rng.normal(0, 0.06 * self.saturation)], np.float32
        )
        return AXES @ (direction / np.float32(np.sqrt((direction**2).sum()))) * np.float32(3**0.5)


def random_palette(rng: np.random.Generator) -> Palette:
    """Random palette of 4 to 10 colours around one cast, from grey to colourful."""
    count = int(rng.integers(4, 11))
    saturation = float(rng.choice([0.0, rng.uniform(0.3, 1.0), rng.uniform(1.0, 2.0)], p=[0.05, 0.6, 0.35]))
    light = rng.beta(1.1, 1.5, count)  # covers black to white
    warm = rng.normal(0, 1, (count, 1)) + rng.normal(0.2, 1)  # one cast for the scene, and colours around it
    # daylight, skin, wood and earth: yellower colours are also redder
    hues = (warm * [0.11, 0.035] + rng.normal(0, 1, (count, 2)) * [0.05, 0.04]) * saturation
    # colours near black or white have little chroma
    chroma = (4 * light * (1 - light)) ** 0.5
    colours = light[:, None] + (hues * chroma[:, None]) @ AXES[:, 1:].T
    return Palette(
        np.clip(colours, 0, 1).astype(np.float32), saturation, float(rng.choice([0.0, 0.03, 0.4], p=[0.6, 0.32, 0.08]))
    )

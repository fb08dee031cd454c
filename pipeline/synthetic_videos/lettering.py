"""Lettering of titles, subtitles and signs: coverage masks of lines of random words, float32 `(h, w)`.

The glyphs are a 5 x 7 dot alphabet, enlarged and smoothed: thin bright strokes on any background matter here, not typography.
"""

from __future__ import annotations

import numpy as np

_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 11110 10001 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 11110 10000 10000 10000 11111",
    "H": "10001 10001 11111 10001 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "K": "10001 10010 11100 10010 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10011 10001 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 01110 00001 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "V": "10001 10001 10001 10001 01010 01010 00100",
    "X": "10001 01010 00100 00100 01010 10001 10001",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "a": "00000 00000 01110 00001 01111 10001 01111",
    "e": "00000 00000 01110 10001 11111 10000 01110",
    "i": "00100 00000 01100 00100 00100 00100 01110",
    "n": "00000 00000 11110 10001 10001 10001 10001",
    "o": "00000 00000 01110 10001 10001 10001 01110",
    "r": "00000 00000 10111 11000 10000 10000 10000",
    "s": "00000 00000 01111 10000 01110 00001 11110",
    "t": "00100 01110 00100 00100 00100 00100 00011",
    "u": "00000 00000 10001 10001 10001 10001 01111",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}
_DOTS = np.stack([np.array([[dot == "1" for dot in row] for row in glyph.split()]) for glyph in _GLYPHS.values()])
_SPACE = list(_GLYPHS).index(" ")


def line(rng: np.random.Generator, letters: int) -> np.ndarray:
    """Line of `letters` random glyphs in words of a few letters: bool dots `(9, 6 * letters + 1)` with an empty border of one dot."""
    chosen = rng.integers(0, len(_DOTS) - 1, letters)
    chosen[np.cumsum(rng.integers(3, 8, letters))[: letters // 4] % letters] = _SPACE
    dots = np.zeros((9, 6 * letters + 1), bool)
    dots[1:8, 1:] = np.concatenate([np.pad(_DOTS[glyph], ((0, 0), (0, 1))) for glyph in chosen], axis=1)
    return dots


def lettering(rng: np.random.Generator, height: float, widest: int) -> np.ndarray:
    """Line of text about `height` pixels high and at most `widest` wide, with smooth edges: float32 coverage `(h, w)` in [0, 1]."""
    dot = max(height / 7, 1.0)
    most = max(int(widest / dot - 1) // 6, 1)
    dots = line(rng, int(rng.integers(1, min(most, 24) + 1)))
    rows, columns = dots.shape
    y = (np.arange(int(rows * dot)) + 0.5) / dot - 0.5
    x = (np.arange(int(columns * dot)) + 0.5) / dot - 0.5
    smooth = _mix(_mix(dots.astype(np.float32), y).T, x).T
    # linear between dots; the outline at one half is sharpened to about a pixel
    return np.clip((smooth - 0.5) * np.float32(min(dot, 2.5)) + 0.5, 0, 1)


def _mix(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation between the rows of an array at fractional positions, constant beyond the ends."""
    position = np.clip(at, 0, len(rows) - 1)
    low = np.minimum(position.astype(np.int64), len(rows) - 2)
    part = (position - low).astype(np.float32)[:, None]
    return rows[low] * (1 - part) + rows[low + 1] * part

"""Filters of libav's scaler (swscale: BICUBIC, ACCURATE_RND, BITEXACT) as matrices of integers, to scale elsewhere with the same bits.

swscale scales 8-bit planes with integers: across, with weights of 14 bits, to 15-bit values; then down, with weights of 12 bits, to 8 bits.
An output sample is a sum over a few neighbours, so each direction is a matrix with that many values in a row. The weights are those that
libswscale 9 computes (bicubic with B = 0, C = 0.6, widened when it shrinks); `tests/engine/test_nvdec_scaler.py` compares the planes with
libswscale's, and every decoder process does so before its first video.

Chroma of 4:2:0 may lie between two samples of luma or on one of them: `position`, of 256 parts of the distance of two chroma samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ACROSS_BITS, DOWN_BITS = 14, 12  # the weights of a row add up to 1 << bits
ACROSS_ALIGN, DOWN_ALIGN = 4, 2  # numbers of weights are multiples of these
CENTRED = 128  # position of luma, and of chroma in the middle of its two samples of luma
C_24 = int(0.6 * (1 << 24))
SMALL = 0.002  # of the weight at distance 0: so much is cut off at each end of a row
CACHED = (
    1024  # rows of weights of a direction, some 40 kB each: two directions of luma and chroma for each pair of sizes
)


def across(source: int, target: int, position: int = CENTRED) -> np.ndarray:
    """Weights `(target, source)`, int32, of the samples of a line."""
    return _matrix(source, target, position, ACROSS_BITS, ACROSS_ALIGN)


def down(source: int, target: int, position: int = CENTRED) -> np.ndarray:
    """Weights `(target, source)`, int32, of the lines of a plane."""
    return _matrix(source, target, position, DOWN_BITS, DOWN_ALIGN)


def _matrix(source: int, target: int, position: int, bits: int, align: int) -> np.ndarray:
    matrix = np.zeros((target, source), np.int32)
    places, weights = _rows(source, target, position, bits, align)
    columns = places[:, None] + np.arange(weights.shape[1])
    np.put_along_axis(matrix, columns, weights, axis=1)
    return matrix


@lru_cache(CACHED)
def _rows(source: int, target: int, position: int, bits: int, align: int) -> tuple[np.ndarray, np.ndarray]:
    """First source sample `(target,)` and weights `(target, n)` of each target sample."""
    places, weights = _kernel(source, target, position)
    places, weights = _trimmed(places, weights, SMALL * _one(source, target), align)
    rows = [_inside(place, values, source) for place, values in zip(places, weights, strict=True)]
    firsts = np.array([first for first, _ in rows], np.int64)
    return firsts, np.array([_normalised(values, 1 << bits) for _, values in rows], np.int32)


def _one(source: int, target: int) -> int:
    """The weight of a sample at distance 0."""
    return 1 << (54 - min((source // target).bit_length() - 1 if source >= target else 0, 8))


def _kernel(source: int, target: int, position: int) -> tuple[list[int], list[list[int]]]:
    """First source sample and weights of each target sample, before they are cut and normalised."""
    step = ((source << 16) + (target >> 1)) // target  # source samples between two target samples, 16 bits of fraction
    one = _one(source, target)
    if abs(step - (1 << 16)) < 10 and position == CENTRED:
        return list(range(target)), [[one]] * target
    size = 5 if step <= 1 << 16 else 1 + (4 * source + target - 1) // target
    size = max(min(size, source - 2), 1)
    centres = step - (position << 9) + 2 * step * np.arange(target, dtype=np.int64)  # 17 bits of fraction
    places = np.trunc((centres - ((size - 2) << 16)) / (1 << 17)).astype(np.int64)
    distances = np.abs(((places[:, None] + np.arange(size)) << 17) - centres[:, None]) << 13  # 30 bits of fraction
    if step > 1 << 16:
        distances = distances * target // source
    weights = _cubic(distances)
    return places.tolist(), (np.sign(weights) * (np.abs(weights) // ((1 << 54) // one))).tolist()


def _cubic(distances: np.ndarray) -> np.ndarray:
    """Weights (54 bits of fraction) at distances (30 bits)."""
    near, far = distances < 1 << 30, distances < 1 << 31
    d = np.where(far, distances, 0)
    square = (d * d) >> 30
    cube = (square * d) >> 30
    inner = ((12 << 24) - 6 * C_24) * cube + ((-18 << 24) + 6 * C_24) * square + ((6 << 24) << 30)
    outer = -6 * C_24 * cube + 30 * C_24 * square - 48 * C_24 * d + ((24 * C_24) << 30)
    return np.where(near, inner, np.where(far, outer, 0))


def _trimmed(
    places: list[int], weights: list[list[int]], small: float, align: int
) -> tuple[list[int], list[list[int]]]:
    """The same without weights at the ends that are `small` together, all rows of one length."""
    places, rows, longest = list(places), [list(row) for row in weights], 0
    size = len(rows[0])
    for number in range(len(rows) - 1, -1, -1):
        row, cut = rows[number], 0
        for _ in range(size):
            cut += abs(row[0])
            # Places must not descend.
            if cut > small or (number + 1 < len(rows) and places[number] >= places[number + 1]):
                break
            row.append(0)
            del row[0]
            places[number] += 1
        cut, length = 0, size
        for value in row[:0:-1]:
            cut += abs(value)
            if cut > small:
                break
            length -= 1
        longest = max(longest, length)
    align = 1 if longest == 1 and align == DOWN_ALIGN else align
    padded = (longest + align - 1) // align * align
    return places, [(row[:longest] + [0] * padded)[:padded] for row in rows]


def _inside(place: int, values: list[int], source: int) -> tuple[int, list[int]]:
    """Weights of samples beyond an edge added to that of the sample at the edge."""
    inside = [0] * len(values)
    first = max(0, min(place, source - len(values)))
    for offset, value in enumerate(values):
        inside[max(0, min(place + offset, source - 1)) - first] += value
    return first, inside


def _normalised(values: list[int], one: int) -> list[int]:
    """Integers whose sum is `one`: the rounding error of a weight is carried to the next."""
    scale = (sum(values) + one // 2) // one
    error, found = 0, []
    for value in values:
        value += error
        rounded = (abs(value) + (scale >> 1)) // scale * (1 if value >= 0 else -1)
        found.append(rounded)
        error = value - rounded * scale
    return found

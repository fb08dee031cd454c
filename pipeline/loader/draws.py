"""Counter-based random numbers: pure functions of named values, the same on every machine, rank and version of numpy.

Only Philox's raw 64-bit stream is used, whose values are fixed by its definition (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC11); numpy's distributions and shuffles may change between versions. Permutations sort raw values, with the index below them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

INDEX_BITS = 24  # of a sort key, where they suffice; the random bits above decide, the index breaks ties
CHUNK = 1 << 20  # values that are numbered at a time


def key_of(*values: object) -> int:
    """128-bit key of a sequence of strings and integers. The type is part of it, hence no other types.

    Raises:
        TypeError: neither `str` nor `int`.
    """
    if odd := [value for value in values if type(value) not in (str, int)]:
        raise TypeError(f"key_of: expected str and int, got {type(odd[0]).__name__}")
    text = "\x1f".join(f"{type(value).__name__}:{value}" for value in values)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def raw(key: int, n: int) -> np.ndarray:
    """The first `n` values of the stream of `key`, uint64."""
    return np.random.Philox(key=key).random_raw(n)


def uniform(key: int, n: int) -> np.ndarray:
    """`n` float64 values in [0, 1)."""
    return (raw(key, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def whole(key: int, below: int) -> int:
    """One number in [0, below)."""
    return int(raw(key, 1)[0]) * below >> 64


def normal(key: int, n: int) -> np.ndarray:
    """`n` float32 values of the standard normal distribution (Box and Muller). Machines may differ in the last bit."""
    bits = raw(key, (n + 1) // 2)
    radius = (bits >> np.uint64(32)).astype(np.float32)
    radius = np.sqrt(-2.0 * np.log((radius + np.float32(1.0)) * np.float32(2.0**-32)))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2.0 * np.pi * 2.0**-32)
    made = np.empty(2 * len(bits), np.float32)
    np.multiply(radius, np.cos(angle), out=made[0::2])
    np.multiply(radius, np.sin(angle), out=made[1::2])
    return made[:n]


def permutation(key: int, n: int) -> np.ndarray:
    """The numbers 0 to n - 1 in random order, int64."""
    return _order_of(raw(key, n))


def shuffle_parts(values: np.ndarray, sizes: Iterable[int], key: int) -> None:
    """Shuffles `values` in place within parts of these sizes, one after another. Memory: 8 bytes for each value of the largest part."""
    stream, at = np.random.Philox(key=key), 0
    for size in sizes:
        part = slice(at, at + size)
        values[part] = values[part][_order_of(stream.random_raw(size))]
        at += size


def _order_of(values: np.ndarray) -> np.ndarray:
    """Indices that sort uint64 `values`, which are overwritten, by their upper bits, ties by index: int64."""
    n = len(values)
    bits = np.uint64(INDEX_BITS if n <= 1 << INDEX_BITS else 32)
    below = (np.uint64(1) << bits) - np.uint64(1)
    values &= ~below
    for at in range(0, n, CHUNK):
        values[at : at + CHUNK] |= np.arange(at, min(at + CHUNK, n), dtype=np.uint64)
    values.sort()  # sorting values that hold their index is faster than argsort
    values &= below
    return values.view(np.int64)

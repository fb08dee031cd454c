"""Codec of stored tensors: int8 per channel, and byte-shuffled zstd over any type. Plain types are stored as they are in memory.

A *storage name* says how the bytes of a tensor are to be read: `float16`, `bfloat16`, `float32`, `int8`, or one of these and `+zstd`. It is
the `dtype` of index rows and Parquet columns. Arrays are `CTHW`, bfloat16 as uint16 bits. docs/formats.md has the layout and recipes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.records import LATENT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

INT8 = "int8"
_ZSTD = "+zstd"
ZSTD_LEVEL = 3
"""Of float16 latents level 1 takes 1.2 % more, level 9 saves 0.8 % more (docs/storage.md)."""
_LEVELS, _LOWEST = 255, -128


def storage_name(dtype: str, compression: str) -> str:
    """Storage name of `write.dtype` and `write.compression`."""
    return dtype + _ZSTD if compression == "zstd" else dtype


def is_plain(storage: str) -> bool:
    """Whether the stored bytes are the values."""
    return storage in LATENT_DTYPES


def element_of(storage: str) -> str:
    """Type of the stored numbers: `int8` or one of `LATENT_DTYPES`."""
    return storage.removesuffix(_ZSTD)


def value_type(storage: str) -> str:
    """Type that a tensor is read as, one of `LATENT_DTYPES`: `float16` for int8."""
    return "float16" if element_of(storage) == INT8 else element_of(storage)


def held_type(dtype: str) -> str:
    """Type of a tensor before it is stored as `dtype`: float32 for int8, whose step is known when the whole tensor is."""
    return "float32" if dtype == INT8 else dtype


def stored_length(storage: str, shape: Sequence[int]) -> int | None:
    """Bytes of a stored tensor of this shape; None if they depend on its values."""
    return None if storage.endswith(_ZSTD) else _length(storage, shape)


def encoded(array_CTHW: np.ndarray, storage: str) -> np.ndarray:
    """The bytes to store, uint8, of a finite array in the `held_type` of the element. Holds a few copies of the tensor.

    Plain types: without a copy if the array is contiguous.
    """
    data = _quantised(array_CTHW) if element_of(storage) == INT8 else np.ascontiguousarray(array_CTHW)
    flat = data.reshape(-1).view(np.uint8)
    if not storage.endswith(_ZSTD):
        return flat
    width = _width(storage)
    shuffled = np.ascontiguousarray(flat.reshape(-1, width).T)
    return np.frombuffer(_zstd().compress(shuffled), np.uint8)


def decoded(data: bytes | memoryview, storage: str, shape: Sequence[int]) -> np.ndarray:
    """Values of a stored tensor of this shape, of the numpy type of `value_type`. Plain types: without a copy.

    Raises:
        ValueError: the bytes are not such a tensor.
    """
    element, raw = element_of(storage), np.frombuffer(data, np.uint8)
    length = _length(storage, shape)
    if storage.endswith(_ZSTD):
        try:
            shuffled = np.frombuffer(_zstd().decompress(data, length), np.uint8)
        except OSError as error:
            raise ValueError(f"{len(data)} bytes are not a zstd frame of {length} bytes: {error}") from None
        raw = np.ascontiguousarray(shuffled.reshape(_width(storage), -1).T).reshape(-1)
    elif len(raw) != length:
        raise ValueError(f"{len(raw)} bytes are not a tensor {element} of shape {tuple(shape)}, which has {length}")
    if element != INT8:
        return raw.view(LATENT_DTYPES[element]).reshape(shape)
    head = 8 * shape[0]
    scale_C, zero_C = raw[:head].view("<f4").reshape(2, -1, 1)
    values_CN = raw[head:].view(np.int8).reshape(shape[0], -1).astype(np.float32)
    values_CN *= scale_C
    values_CN += zero_C
    with np.errstate(over="ignore"):  # of damaged bytes: infinities are reported
        return values_CN.astype("<f2").reshape(shape)


def _quantised(array_CTHW: np.ndarray) -> np.ndarray:
    """`scale` and `zero` of each channel, float32, then the int8 values: `value = q * scale + zero`, off by at most half a scale.

    The smallest value of a channel becomes -128, the largest 127: no value is cut off.
    """
    channels = len(array_CTHW)
    out = np.empty(8 * channels + array_CTHW.size, np.uint8)
    scale_C, zero_C = out[: 8 * channels].view("<f4").reshape(2, -1)
    levels_CN = out[8 * channels :].view(np.int8).reshape(channels, -1)
    for channel, values_THW in enumerate(array_CTHW):
        low, high = float(values_THW.min()), float(values_THW.max())
        scale_C[channel] = (high - low) / _LEVELS
        scale = float(scale_C[channel])  # as it is stored
        zero_C[channel] = low - _LOWEST * scale
        if scale == 0:
            levels_CN[channel] = 0
            continue
        levels = (values_THW - zero_C[channel]).reshape(-1)
        levels /= scale_C[channel]
        np.rint(levels, out=levels)
        levels_CN[channel] = np.clip(levels, _LOWEST, _LOWEST + _LEVELS)
    return out


def _length(storage: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor before compression."""
    head = 8 * shape[0] if element_of(storage) == INT8 else 0
    return head + math.prod(shape) * _width(storage)


def _width(storage: str) -> int:
    element = element_of(storage)
    return 1 if element == INT8 else np.dtype(LATENT_DTYPES[element]).itemsize


def _zstd() -> pa.Codec:
    return pa.Codec("zstd", compression_level=ZSTD_LEVEL)

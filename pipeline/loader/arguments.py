"""Checks of arguments, which also give one value one type: `numpy.int64(5)`, which the order would tell from 5, becomes 5."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from pipeline.errors import ConfigError


def integer(name: str, value: Any, least: int | None = None) -> int:
    """A whole number as `int`. Raises ConfigError for another type (also bool and float) or less than `least`."""
    bound = "" if least is None else f" >= {least}"
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool | np.bool_) or (least is not None and found < least):
        raise ConfigError(f"{name}: expected a whole number{bound}, got {value!r}")
    return found


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number from `low` to `high` as `float`. Raises ConfigError for anything else."""
    bound = f"from {low:g} to {high:g}" if high < math.inf else f">= {low:g}"
    if (
        isinstance(value, bool | np.bool_)
        or not isinstance(value, int | float | np.number)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ConfigError(f"{name}: expected a number {bound}, got {value!r}")
    return float(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings as a tuple; one string is a list of one. Raises ConfigError for anything else."""
    if isinstance(value, str):
        return (value,)
    try:
        found = tuple(value)
    except TypeError:
        found = (None,)
    if not all(isinstance(item, str) for item in found):
        raise ConfigError(f"{name}: expected a list of strings, got {value!r}")
    return found

"""Weights and images from sines, the same on every machine, for comparisons with numbers that published code gave for them."""

from __future__ import annotations

import math

import torch


def wave(shape, phase):
    """float64 of `shape` between -2 and 2."""
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(place * 0.7 + phase) + torch.sin(place * place % 1009 * 1.3 + 2 * phase)).view(shape)


def wave_weights(shapes, scaled):
    """Weights by key; `scaled(key, values)` gives each tensor its size. The phase is a key's place in alphabetic order."""
    return {key: scaled(key, wave(shape, phase)).float() for phase, (key, shape) in enumerate(sorted(shapes.items()))}

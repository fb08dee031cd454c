"""Random weights of a LeanVAE for trials, by their published names."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.leanvae.network import Network

if TYPE_CHECKING:
    from collections.abc import Mapping


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one. Their latents mean nothing.
    """
    return {
        key: _random_tensor(key, tuple(meta.shape), seed) for key, meta in Network.empty(config).state_dict().items()
    }


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32).reshape(shape).copy())
    if key.endswith("bottleneck.Q"):
        return noise * shape[0] ** -0.5
    if ".weights." in key:
        return torch.full(shape, 0.5, dtype=torch.float32)
    if ".threshold." in key:
        return torch.full(shape, 0.05, dtype=torch.float32)
    if key.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:  # LayerNorm
        return 1 + 0.02 * noise
    fan_in = int(np.prod(shape[1:]))
    if "ds_conv" in key:
        noise = 0.3 * noise
    elif key.startswith("decoder.") and "_proj." in key:
        noise = 0.25 * noise  # keeps most of a decoded video within the value range
    return noise * fan_in**-0.5

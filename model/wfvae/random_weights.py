"""Random weights of WF-VAE and WFVAE2 for trials, by their published names, and the Haar filters that averaged weights lack."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.wfvae.network import Network
from model.wfvae.wavelets import default_filter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def is_filter(key: str) -> bool:
    """Whether a published key names a Haar filter, which training does not change."""
    return "wavelet_transform" in key


def with_filters(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, with default Haar filters where they are missing.

    The one exception to strict keys: averaged (EMA) weights cover trained tensors only, so they lack the filters.
    """
    absent = (key for key in expected if is_filter(key) and key not in weights)
    return {**weights, **{key: default_filter(key) for key in absent}}


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one; Haar filters are the real ones. Latents of random weights are meaningless.
    """
    return random_tensors(Network.empty(config), seed)


def random_tensors(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """`random_weights` of any network made of these blocks."""
    return {key: _random_tensor(key, tuple(meta.shape), seed) for key, meta in network.state_dict().items()}


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if is_filter(key):
        return default_filter(key)
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32).reshape(shape))
    if key.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:  # a norm
        return 1 + 0.02 * noise
    if ".conv2." in key or ".proj_out." in key:
        noise = 0.5 * noise  # branches added to the residual stream
    elif key.startswith("decoder.conv_out") or "decoder.connect" in key or "flow_conv" in key:
        noise = 0.25 * noise  # keeps most of a decoded video within the value range
    return noise * int(np.prod(shape[1:])) ** -0.5

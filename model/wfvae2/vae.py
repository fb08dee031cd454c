"""WFVAE2 ready to run. Its layers are WF-VAE's and equally causal, so it is stepped the same way; the authors published no tiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.weights import check_weights
from model.wfvae.random_weights import random_tensors, with_filters
from model.wfvae.vae import NUMERICS, build
from model.wfvae2.network import Network

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.interface import LatentSpec
    from model.weights import CheckedWeights

__all__ = ["NUMERICS", "build", "check", "random_weights"]


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; see `model.wfvae.random_weights`."""
    return random_tensors(Network.empty(config), seed)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    network = Network.empty(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))

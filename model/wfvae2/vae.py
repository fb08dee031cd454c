"""WFVAE2 ready to run, with the interface of `model.wfvae.vae`.

Its layers are WF-VAE's and equally causal, so it is stepped the same way and chunks are as lossless. The authors published no tiling.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from model.weights import check_weights, fill
from model.wfvae.random_weights import random_tensors, with_filters
from model.wfvae.vae import StreamedVAE
from model.wfvae2.fast import prepare_decoder, prepare_encoder
from model.wfvae2.network import empty_network

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.interface import LatentSpec
    from model.weights import CheckedWeights, WeightsSha256
    from model.wfvae.fast.decoder import Decoder
    from model.wfvae.fast.encoder import Encoder


__all__ = ["NUMERICS", "WFVAE2", "build", "check", "random_weights"]

NUMERICS = 1  # increase when the same weights and frames give other bits; part of every build's fingerprint


class WFVAE2(StreamedVAE):
    """WFVAE2 ready to run; implements `model.interface.VideoVAE`, with the properties of `model.wfvae.vae.WFVAE`."""

    numerics = NUMERICS

    @cached_property
    def _encoder(self) -> Encoder:
        return prepare_encoder(self.network.encoder, self.network.state_dict(), self.config, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return prepare_decoder(self.network.decoder, self.network.state_dict(), self.config, self.device, self.dtype)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; see `model.wfvae.random_weights`."""
    return random_tensors(empty_network(config), seed)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    network = empty_network(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> WFVAE2:
    """Network with these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return WFVAE2(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)

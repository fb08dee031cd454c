"""WFVAE2 ready to run: videos or latents in, raw posteriors or videos and the causal state out, as `model.wfvae.vae`.

Its authors published no tiling. Its layers are those of WF-VAE and as causal, so it is stepped through the same way, as losslessly.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from model.weights import check_weights, fill
from model.wfvae.parameters import with_filters
from model.wfvae.vae import StreamedVAE
from model.wfvae2.coder import prepare_decoder, prepare_encoder
from model.wfvae2.parameters import empty_network, random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.interface import LatentSpec
    from model.weights import CheckedWeights, WeightsSha256
    from model.wfvae.decoder import Decoder
    from model.wfvae.encoder import Encoder


__all__ = ["NUMERICS", "WFVAE2", "build", "check", "random_weights"]

NUMERICS = 1  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint


class WFVAE2(StreamedVAE):
    """WFVAE2 ready to run; see `model.interface.VideoVAE` for the contract and `model.wfvae.vae.WFVAE` for the promises."""

    numerics = NUMERICS

    @cached_property
    def _encoder(self) -> Encoder:
        return prepare_encoder(self.network.encoder, self.network.state_dict(), self.config, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return prepare_decoder(self.network.decoder, self.network.state_dict(), self.config, self.device, self.dtype)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Weights compared with their network, which is not built.

    Raises:
        ValueError: keys or shapes that are not this configuration's, or non-finite weights.
    """
    network = empty_network(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> WFVAE2:
    """The VAE of these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return WFVAE2(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)

"""WF-VAE ready to run: its definition in steps. Videos `B 3 T H W` in [-1, 1], first chunk 4n+1 frames, later ones 4n (8 for 8x8x8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.stepped_vae import SteppedVAE
from model.weights import check_weights, fill
from model.wfvae.network import Network
from model.wfvae.random_weights import random_weights, with_filters

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.interface import LatentSpec
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["NUMERICS", "WFVAE", "build", "check", "random_weights"]

NUMERICS = 2  # increase when the same weights and frames give other bits; part of every build's fingerprint


class WFVAE(SteppedVAE):
    """WF-VAE or WFVAE2 ready to run; implements `model.interface.VideoVAE`. `decode(last=False)` holds back frames that need the next
    latent.
    """

    numerics = NUMERICS
    holds_back = True

    def _why_whole(self) -> str:
        if self.config["norm_type"] == "groupnorm":
            return "norm_type 'groupnorm' takes its statistics over all frames of the clip"
        return "its attention, 'AttnBlock3D', mixes the frames of the clip"

    def _phase(self, kind: str, *, first: bool, rows: int) -> str:
        # A decoder that interpolates in time holds no frame back yet.
        return "after the first latent" if kind == "decode" and first and rows == 1 else ""


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    network = Network.empty(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **more: Any
) -> WFVAE:
    """Network with these weights; `more`: `checkpoint` or `seed`, `compiled`."""
    spec = checked.spec.on_device(device.type)
    return WFVAE(fill(checked), spec, checked.config, sha256, device, dtype, **more)

"""IV-VAE ready to run: its definition in steps. Videos `B 3 T H W` in [-1, 1], first chunk 4n+1 frames, later ones 4n.

Returns raw posterior means (the authors' `(z - shift) * scale` is not applied; the constants are in the spec).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.ivvae.network import Network
from model.ivvae.random_weights import random_weights
from model.stepped_vae import SteppedVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.interface import LatentSpec
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["IVVAE", "NUMERICS", "build", "check", "random_weights"]

NUMERICS = 2  # increase when the same weights and frames give other bits; part of every build's fingerprint


class IVVAE(SteppedVAE):
    """IV-VAE ready to run; implements `model.interface.VideoVAE`. The log-variance is not clamped. `decode` needs no look-ahead.

    A step of four frames works on whole frames: encoding takes 0.9 GB (float32) or 0.6 GB (bfloat16) at 256x256, decoding 1.0 or 0.8 GB,
    and memory grows with the area of a frame: 12 or 8 GB, and 14 or 11 GB, at 1280x720 (extrapolated). Weights come on top.
    """

    numerics = NUMERICS


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    return check_weights(Network.empty(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **more: Any
) -> IVVAE:
    """Network with these weights; `more`: `checkpoint` or `seed`, `compiled`."""
    spec = checked.spec.on_device(device.type)
    return IVVAE(fill(checked), spec, checked.config, sha256, device, dtype, **more)

"""Identity of a network in plain data: its specification, configuration and hashes of its weights. No torch here.

A running network (`CausalVAE.identity`) and a checkpoint that was only read (`model.identify`) give the same `Identity`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.registry import family_of

if TYPE_CHECKING:
    from model.checkpoint import CheckpointInfo
    from model.interface import LatentSpec
    from model.weights import WeightsSha256


@dataclass(frozen=True, slots=True)
class Identity:
    """Network and weights.

    `config` is the whole published configuration and `sha256.all` covers every tensor, including the decoder. `latent_config` and
    `latent_sha256` cover only what a latent depends on: two networks that differ in the decoder share them. `numerics` is the version of
    the encoder's arithmetic. `compiled`: its steps run through torch.compile, which rounds in other places.
    """

    spec: LatentSpec
    config: dict[str, Any]
    sha256: WeightsSha256
    numerics: int
    checkpoint: CheckpointInfo | None = None
    seed: int | None = None  # of untrained weights
    compiled: bool = False

    @property
    def latent_config(self) -> dict[str, Any]:
        """Keys of `config` that can change a latent."""
        others = family_of(self.spec.network).latent_part(self.config).other_keys
        return {key: value for key, value in self.config.items() if key not in others}

    def latent_sha256(self, *, moments: bool) -> str:
        """Hash of the tensors that reach the posterior mean; with `moments` also of those that reach the log-variance."""
        return self.sha256.moments if moments else self.sha256.mean

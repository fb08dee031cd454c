"""Which network it is, in plain data: what decides its latents, and what it is besides.

Enters: a configuration and the hashes of checked weights. Leaves: `Identity`, the same for a network that runs (`CausalVAE.identity`) and
for a checkpoint that was only read (`model.identify`). No torch here.
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
    """A network and its weights.

    `config` is the whole published configuration and `sha256.all` covers every tensor: the decoder too. `latent_config` and `latent_sha256`
    are what a latent depends on, so a network with another decoder has the same. `numerics` is the version of the encoder's arithmetic.
    """

    spec: LatentSpec
    config: dict[str, Any]
    sha256: WeightsSha256
    numerics: int
    checkpoint: CheckpointInfo | None = None
    seed: int | None = None  # of untrained weights

    @property
    def latent_config(self) -> dict[str, Any]:
        """The keys of `config` that can change a latent."""
        others = family_of(self.spec.network).latent_part(self.config).other_keys
        return {key: value for key, value in self.config.items() if key not in others}

    def latent_sha256(self, *, moments: bool) -> str:
        """Hash of the tensors that reach the posterior mean; with `moments` of those that reach the log-variance too."""
        return self.sha256.moments if moments else self.sha256.mean

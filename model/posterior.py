"""The encoder's answer, a diagonal Gaussian over latents.

Enters: mean and (on request) log-variance. Leaves: the same, or a seeded draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Posterior:
    """Raw (unscaled) posterior of a video: `mean` `BCthw`, and `logvar` of the same shape or None where it was not asked for."""

    mean: torch.Tensor
    logvar: torch.Tensor | None = None

    def mode(self) -> torch.Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """A draw `BCthw`. The generator is required: an unseeded latent could never be made again.

        Raises:
            ValueError: the log-variance was not computed.
        """
        import torch

        if self.logvar is None:
            raise ValueError("this posterior has no log-variance; encode with moments=True to be able to sample")
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=generator.device).to(
            self.mean.device
        )
        return self.mean + (0.5 * self.logvar).exp() * noise

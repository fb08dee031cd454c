"""Encoder output: a diagonal Gaussian over latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Posterior:
    """Raw (unscaled) posterior of a video: `mean` `BCthw`; `logvar` of the same shape, or None if it was not computed."""

    mean: torch.Tensor = field(repr=False)
    logvar: torch.Tensor | None = field(default=None, repr=False)

    def mode(self) -> torch.Tensor:
        """Most likely latent: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Random draw `BCthw`. The generator is required: an unseeded latent could not be reproduced.

        Raises:
            ValueError: the log-variance was not computed.
        """
        import torch

        if self.logvar is None:
            raise ValueError("this posterior has no log-variance; encode with moments=True to sample")
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=generator.device).to(
            self.mean.device
        )
        return self.mean + (0.5 * self.logvar).exp() * noise

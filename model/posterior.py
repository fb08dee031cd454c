"""Encoder output: a diagonal Gaussian over latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LOGVAR_RANGE = (-30.0, 20.0)
"""Of LeanVAE and WF-VAE, as their authors clamp it."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """Raw (unscaled) posterior of a video: `mean` `BCthw`; `logvar` of the same shape, or None if it was not computed."""

    mean: torch.Tensor = field(repr=False)
    logvar: torch.Tensor | None = field(default=None, repr=False)

    def mode(self) -> torch.Tensor:
        """Most likely latent: the mean."""
        return self.mean

    def with_noise(self, noise_BCthw: torch.Tensor | None) -> torch.Tensor:
        """`BCthw`: mean + exp(logvar / 2) * noise (Kingma and Welling 2014, section 2.4), or the mean if noise is None.

        Raises:
            ValueError: noise of another shape; the log-variance was not computed.
        """
        if noise_BCthw is None:
            return self.mean
        if self.logvar is None:
            raise ValueError("this posterior has no log-variance; encode with moments=True to sample")
        if noise_BCthw.shape != self.mean.shape:
            raise ValueError(
                f"expected noise of the latent's shape {tuple(self.mean.shape)}, got {tuple(noise_BCthw.shape)}; "
                "one standard normal number per latent element"
            )
        return self.mean + (0.5 * self.logvar).exp() * noise_BCthw.to(self.mean)

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

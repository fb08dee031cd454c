"""Sampling of the latent that training decodes, from its posterior and given noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from model.posterior import Posterior


def sample_latent(posterior: Posterior, noise_BCthw: torch.Tensor | None) -> torch.Tensor:
    """`B d t h w`: mean + exp(logvar / 2) * noise (Kingma and Welling 2014, section 2.4), or the mean if noise is None.

    Raises:
        ValueError: noise of another shape; a posterior without log-variance.
    """
    mean, logvar = posterior.mean, posterior.logvar
    if noise_BCthw is None:
        return mean
    if logvar is None:
        raise ValueError("sampling needs mean and log-variance; got a posterior without log-variance")
    if noise_BCthw.shape != mean.shape:
        raise ValueError(
            f"expected noise of the latent's shape {tuple(mean.shape)}, got {tuple(noise_BCthw.shape)}; "
            "one standard normal number per latent element"
        )
    return mean + (0.5 * logvar).exp() * noise_BCthw.to(mean)

"""Statistics of latents `C t h w`: mean, deviation and range per channel, accumulated in float64 and mergeable.

Merging follows Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

from typing import Any

import torch


class LatentMoments:
    """Running statistics per channel, over every position of every latent added."""

    def __init__(self) -> None:
        self.count = 0  # values per channel
        self.mean = self.m2 = self.least = self.most = torch.zeros(0, dtype=torch.float64)

    def add(self, latent_Cthw: torch.Tensor) -> None:
        """Adds a latent of any floating dtype. Raises ValueError for another number of channels."""
        values = latent_Cthw.detach().to("cpu", torch.float64).flatten(1)
        other = LatentMoments()
        other.count = values.shape[1]
        other.mean = values.mean(1)
        other.m2 = (values - other.mean[:, None]).square().sum(1)
        other.least, other.most = values.amin(1), values.amax(1)
        self.merge(other)

    def merge(self, other: LatentMoments) -> None:
        """Adds the statistics of `other`. Raises ValueError for another number of channels."""
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.m2 = other.count, other.mean, other.m2
            self.least, self.most = other.least, other.most
            return
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"got latents of {len(other.mean)} channels, expected {len(self.mean)}")
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.least, self.most = torch.minimum(self.least, other.least), torch.maximum(self.most, other.most)
        self.count = total

    def summary(self) -> dict[str, Any]:
        """JSON-ready: values per channel, and lists of mean, std (of the population), min and max."""
        deviation = (self.m2 / max(self.count, 1)).sqrt()
        return {
            "values_per_channel": self.count,
            "mean": self.mean.tolist(),
            "std": deviation.tolist(),
            "min": self.least.tolist(),
            "max": self.most.tolist(),
        }

"""Frechet video distance between originals and reconstructions (rFVD), from means and covariances of I3D features.

Features `(N, F)` are summed in float64, so memory does not grow with the number of videos. FVD: Unterthiner et al. 2018; distance of
Gaussians: Dowson and Landau 1982.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.evaluation.i3d import FEATURES, WINDOW_FRAMES, to_i3d_input

if TYPE_CHECKING:
    from model.evaluation.i3d import I3D


class FeatureMoments:
    """Mean and covariance of rows, accumulated in parts."""

    def __init__(self, width: int = FEATURES) -> None:
        self.count = 0
        self._total = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros((width, width), dtype=torch.float64)

    def add(self, rows_NF: torch.Tensor) -> None:
        """Adds rows `(N, F)` of any floating dtype."""
        rows = rows_NF.detach().to("cpu", torch.float64)
        self.count += rows.shape[0]
        self._total += rows.sum(0)
        self._products += rows.T @ rows

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(F,)` and covariance `(F, F)`, divided by N - 1 as FVD's authors do. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, got {self.count}")
        mean = self._total / self.count
        return mean, (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """|m - m'|^2 + trace(S + S' - 2 (S S')^(1/2)) of two Gaussians over the same F features, all float64.

    The trace of the root is computed from (S^(1/2) S' S^(1/2))^(1/2), whose eigenvalues are real: this needs no general matrix
    root and works for singular covariances (fewer videos than features).
    """
    root = _root(covariance)
    crossed = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    offset = (mean - other_mean).square().sum()
    return float(offset + covariance.trace() + other_covariance.trace() - 2 * crossed)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class WindowFeatures:
    """Features of a clip and its reconstruction in consecutive windows of 16 frames; remaining frames are not used."""

    def __init__(self, network: I3D) -> None:
        self._network = network
        self._frames: tuple[torch.Tensor, torch.Tensor] | None = None
        self.original: list[torch.Tensor] = []  # (1, F) each
        self.other: list[torch.Tensor] = []

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """Adds the next frames, uint8 `3 T H W` of both."""
        if self._frames is not None:
            original_CTHW = torch.cat([self._frames[0], original_CTHW], dim=1)
            other_CTHW = torch.cat([self._frames[1], other_CTHW], dim=1)
        while original_CTHW.shape[1] >= WINDOW_FRAMES:
            for video, features in ((original_CTHW, self.original), (other_CTHW, self.other)):
                window = to_i3d_input(video[None, :, :WINDOW_FRAMES])
                with torch.inference_mode():
                    features.append(self._network(window).cpu())
            original_CTHW, other_CTHW = original_CTHW[:, WINDOW_FRAMES:], other_CTHW[:, WINDOW_FRAMES:]
        self._frames = original_CTHW, other_CTHW


class VideoDistance:
    """rFVD over many clips."""

    def __init__(self) -> None:
        self._original, self._other = FeatureMoments(), FeatureMoments()

    def add(self, features: WindowFeatures) -> None:
        """Adds the windows of one clip."""
        for rows, moments in ((features.original, self._original), (features.other, self._other)):
            if rows:
                moments.add(torch.cat(rows))

    def summary(self) -> dict[str, Any]:
        """JSON-ready: the distance (None for fewer than two windows) and the number of windows."""
        windows = self._original.count
        if windows < 2:
            return {"rfvd": None, "windows": windows, "window_frames": WINDOW_FRAMES}
        distance = frechet_distance(*self._original.mean_and_covariance(), *self._other.mean_and_covariance())
        return {"rfvd": distance, "windows": windows, "window_frames": WINDOW_FRAMES}

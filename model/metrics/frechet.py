"""Frechet video distance between originals and reconstructions (rFVD), from means and covariances of I3D features.

Features `(N, F)` are summed in float64, so memory does not grow with the number of videos. FVD: Unterthiner et al. 2018; distance of
Gaussians: Dowson and Landau 1982.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.metrics.i3d import FEATURES, FEWEST_FRAMES, PROTOCOLS, to_i3d_input

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.metrics.i3d import I3D, Protocol


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
    """Features of a clip and its reconstruction: one row for each window of the protocol, or one for the whole clip.

    Frames after the last full window are not used. A whole clip's frames are kept at 224 x 224 until `finish`.
    """

    def __init__(self, network: I3D, protocol: Protocol = PROTOCOLS["tf"]) -> None:
        self._network, self._protocol = network, protocol
        self._frames: tuple[torch.Tensor, torch.Tensor] | None = None  # inputs of the network not used yet
        self.original: list[torch.Tensor] = []  # (1, F) each
        self.other: list[torch.Tensor] = []

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """Adds the next frames, uint8 `3 T H W` of both."""
        if not original_CTHW.shape[1]:
            return
        whole = self._protocol.whole_frames
        frames = [to_i3d_input(video[None], whole_frames=whole) for video in (original_CTHW, other_CTHW)]
        if self._frames is not None:
            frames = [torch.cat(parts, dim=2) for parts in zip(self._frames, frames, strict=True)]
        window = self._protocol.window_frames
        while window is not None and frames[0].shape[2] >= window:
            self._measure([video[:, :, :window] for video in frames])
            frames = [video[:, :, window:] for video in frames]
        self._frames = frames[0], frames[1]

    def finish(self) -> None:
        """Ends the clip. A whole clip of fewer frames than I3D takes has no features."""
        if (
            self._protocol.window_frames is None
            and self._frames is not None
            and self._frames[0].shape[2] >= FEWEST_FRAMES
        ):
            self._measure(self._frames)
        self._frames = None

    def _measure(self, videos: Sequence[torch.Tensor]) -> None:
        for video, features in zip(videos, (self.original, self.other), strict=True):
            with torch.inference_mode():
                features.append(self._network(video).cpu())


class VideoDistance:
    """rFVD over many clips."""

    def __init__(self, protocol: str = "tf") -> None:
        """`protocol`: one of `PROTOCOLS`, that of the features."""
        self._protocol = protocol
        self._original, self._other = FeatureMoments(), FeatureMoments()
        self._squares = 0.0

    def add(self, features: WindowFeatures) -> None:
        """Adds the windows of one clip."""
        if not features.original:
            return
        original, other = torch.cat(features.original), torch.cat(features.other)
        self._original.add(original)
        self._other.add(other)
        self._squares += float((original.double() - other.double()).square().sum())

    def summary(self) -> dict[str, Any]:
        """JSON-ready: the distance (None for fewer than two windows), the number of windows, and the mean of their `pair_distance`.

        `pair_distance` is |f - f'|^2 of one window's features: what published scripts print as rFVD if they run with a batch size of 1,
        because a distance between two single videos is that of their features.
        """
        windows = self._original.count
        found = {
            "protocol": self._protocol,
            "rfvd": None,
            "pair_distance": self._squares / windows if windows else None,
            "windows": windows,
            "window_frames": PROTOCOLS[self._protocol].window_frames,
        }
        if windows < 2:
            return found
        distance = frechet_distance(*self._original.mean_and_covariance(), *self._other.mean_and_covariance())
        return found | {"rfvd": distance}

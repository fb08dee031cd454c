"""Best linear autoencoder of pixel blocks, by principal components: initial weights and baseline of a training run.

Takes clips `B 3 T H W` of any scaling, T = 4n+1; returns a `LinearAutoencoder` of 4 x side x side blocks for groups of frames and
1 x side x side blocks for frame 0, with latents `B d t h w` of unit variance per channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.layers import COLOURS
from model.leanvae.facts import FRAMES
from model.leanvae.network import bands_of, patches_of

if TYPE_CHECKING:
    from collections.abc import Iterable

# Components with less variance than this share of the largest, or than this absolute value, are not scaled up further.
RELATIVE_FLOOR, ABSOLUTE_FLOOR = 1e-9, 1e-12


@dataclass(frozen=True, slots=True)
class BlockComponents:
    """Principal components of one kind of block, all float64; P = 3 * frames * side^2 in the order (rgb, frame, row, column)."""

    mean: torch.Tensor = field(repr=False)  # (P,)
    encode: torch.Tensor = field(repr=False)  # (d, P), block minus mean -> latent of unit variance
    decode: torch.Tensor = field(repr=False)  # (P, d), latent -> block minus mean
    covariance: torch.Tensor = field(repr=False)  # (P, P), of the blocks it was fitted on


@dataclass(frozen=True, slots=True)
class LinearAutoencoder:
    """Codes frame 0 with `image` and every four frames after it with `video`, each block independently."""

    image: BlockComponents
    video: BlockComponents
    side: int

    @property
    def latent_channels(self) -> int:
        """Latent channels of both parts."""
        return int(self.video.encode.shape[0])

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W`, T = 4n+1 -> `B d t h w`. Raises ValueError for sizes that do not fit."""
        check_clip(video_BCTHW, self.side)
        parts = []
        for blocks, depth, frames in self._parts(video_BCTHW):
            rows = patches_of(frames, depth, self.side)
            parts.append((rows - blocks.mean.to(rows)) @ blocks.encode.to(rows).T)
        return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)

    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """`B d t h w` -> `B 3 T H W`, not clamped."""
        rows = latent_BCthw.permute(0, 2, 3, 4, 1)
        parts = []
        for blocks, depth, part in ((self.image, 1, rows[:, :1]), (self.video, FRAMES, rows[:, 1:])):
            pixels = part @ blocks.decode.to(part).T + blocks.mean.to(part)
            parts.append(bands_of(pixels, depth, self.side))
        return torch.cat(parts, dim=2)

    def _parts(self, video_BCTHW: torch.Tensor) -> tuple[tuple[BlockComponents, int, torch.Tensor], ...]:
        return (self.image, 1, video_BCTHW[:, :, :1]), (self.video, FRAMES, video_BCTHW[:, :, 1:])


def check_clip(video_BCTHW: torch.Tensor, side: int) -> None:
    """Raises ValueError unless the clip is floating `B 3 4n+1 H W` with sides that are multiples of `side`."""
    if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != COLOURS or not video_BCTHW.is_floating_point():
        raise ValueError(
            f"expected floating clips of shape (B, 3, T, H, W), got {video_BCTHW.dtype} {tuple(video_BCTHW.shape)}"
        )
    frames, height, width = video_BCTHW.shape[2:]
    if frames % FRAMES != 1 or height % side or width % side or 0 in video_BCTHW.shape:
        raise ValueError(
            f"expected clips of {FRAMES}n+1 frames with sides that are multiples of {side}, got {frames} frames of {height}x{width}"
        )


class _Moments:
    """Mean and covariance of rows, accumulated in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros((width, width), dtype=torch.float64)

    def add(self, rows_NP: torch.Tensor) -> None:
        rows = rows_NP.detach().to("cpu", torch.float64)
        self.count += rows.shape[0]
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.total / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)


def fit_linear(clips: Iterable[torch.Tensor], latent_channels: int, *, side: int = 8) -> LinearAutoencoder:
    """Principal component analysis of all blocks of all clips in one pass; memory does not grow with their number.

    Args:
        clips: floating `B 3 T H W`, T = 4n+1, in the network's value range; sizes may differ.
        latent_channels: d, at most 3 * side^2 (the size of a block of frame 0).
        side: side of a block in pixels, twice the configuration's patch.

    The image part's latents are rotated (which changes no reconstruction) so that a frame, and the same frame repeated four times,
    have latents as similar as possible: causal layers then see the same signal in every row.

    Raises:
        ValueError: clips that do not fit; fewer blocks of a kind than latent channels.
    """
    still, moving = COLOURS * side * side, COLOURS * FRAMES * side * side
    if not 1 <= latent_channels <= still:
        raise ValueError(f"latent_channels must lie in 1..{still} for blocks of {side}x{side}, got {latent_channels}")
    moments = {1: _Moments(still), FRAMES: _Moments(moving)}
    for clip in clips:
        check_clip(clip, side)
        moments[1].add(patches_of(clip[:, :, :1], 1, side).flatten(0, 3))
        if clip.shape[2] > 1:
            moments[FRAMES].add(patches_of(clip[:, :, 1:], FRAMES, side).flatten(0, 3))
    for depth, sums in moments.items():
        if sums.count <= latent_channels:
            raise ValueError(
                f"{sums.count} blocks of {depth} frame(s) are too few for {latent_channels} components; give more clips, "
                f"with at least {FRAMES + 1} frames among them"
            )
    image = _components(*moments[1].mean_and_covariance(), latent_channels)
    video = _components(*moments[FRAMES].mean_and_covariance(), latent_channels)
    return LinearAutoencoder(_rotated(image, video), video, side)


def principal(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest variances, and their directions as columns, with fixed signs (the largest entry is positive)."""
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:count].clamp_min(0), directions.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return variances, directions * torch.where(largest < 0, -1.0, 1.0)


def _components(mean: torch.Tensor, covariance: torch.Tensor, count: int) -> BlockComponents:
    variances, directions = principal(covariance, count)
    floor = max(float(variances[0]) * RELATIVE_FLOOR, ABSOLUTE_FLOOR)
    deviations = variances.clamp_min(floor).sqrt()
    return BlockComponents(mean, (directions / deviations).T, directions * deviations, covariance)


def _rotated(image: BlockComponents, video: BlockComponents) -> BlockComponents:
    """The image part with its latents rotated towards those of the same frame repeated (orthogonal Procrustes)."""
    still = image.mean.shape[0]
    per_colour = still // COLOURS
    repeat = torch.eye(COLOURS * per_colour, dtype=torch.float64).view(COLOURS, 1, per_colour, still)
    repeat = repeat.expand(-1, FRAMES, -1, -1).reshape(-1, still)
    crossed = video.encode @ repeat @ image.covariance @ image.encode.T
    left, _, right = torch.linalg.svd(crossed)
    turn = left @ right
    return BlockComponents(image.mean, turn @ image.encode, image.decode @ turn.T, image.covariance)

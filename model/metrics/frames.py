"""PSNR and SSIM of each frame of a clip, in float64: uint8 frames `C T H W` of both, black 0, white 255.

SSIM is that of Wang et al. 2004 and of the scripts of LeanVAE and WF-VAE: 11x11 Gaussian window, sigma 1.5, per colour, mean over the
pixels whose window lies inside the frame. float64, because float32 loses the variance of bright flat areas: equal frames of 235 would have
0.9987, other frames more than 1.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

WHITE = 255.0
MOST_DB = 100.0  # PSNR of identical frames, whose error is zero; as in published code
SSIM_WINDOW = 11  # pixels a side
SSIM_CONVENTION = "11x11 Gaussian window, sigma 1.5, per colour, without the 5 pixels at each border, float64"
SIGMA = 1.5
LIGHT, CONTRAST = (0.01 * WHITE) ** 2, (0.03 * WHITE) ** 2  # C1 and C2 of the paper


def decibels_of(mean_square: float) -> float:
    """PSNR of a mean squared error of 8-bit values, at most `MOST_DB`."""
    return MOST_DB if mean_square == 0 else min(MOST_DB, 10 * math.log10(WHITE**2 / mean_square))


def frame_psnr(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> list[float]:
    """PSNR of each frame in dB."""
    return [decibels_of(float((one - other).square().mean())) for one, other in _frames(original_CTHW, other_CTHW)]


def frame_ssim(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> list[float]:
    """SSIM of each frame. Empty for frames smaller than the window."""
    if min(original_CTHW.shape[2:]) < SSIM_WINDOW:
        return []
    return [_ssim(one, other) for one, other in _frames(original_CTHW, other_CTHW)]


def _frames(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Frames `C H W` of both; one at a time bounds the memory."""
    for frame in range(original_CTHW.shape[1]):
        yield original_CTHW[:, frame].double(), other_CTHW[:, frame].double()


def _ssim(one_CHW: torch.Tensor, other_CHW: torch.Tensor) -> float:
    mean, other_mean = _blurred(one_CHW), _blurred(other_CHW)
    means, both = mean * other_mean, mean.square() + other_mean.square()
    covariance = _blurred(one_CHW * other_CHW) - means
    variances = _blurred(one_CHW.square() + other_CHW.square()) - both
    similarity = (2 * means + LIGHT) * (2 * covariance + CONTRAST) / ((both + LIGHT) * (variances + CONTRAST))
    return float(similarity.mean())


def _blurred(pixels_CHW: torch.Tensor) -> torch.Tensor:
    """Gaussian means of the windows that lie inside: `C H-10 W-10`. Sums of shifted rows, then columns: a window is not copied."""
    for dim in (1, 2):
        size = pixels_CHW.shape[dim] - SSIM_WINDOW + 1
        first, *rest = _window()
        total = pixels_CHW.narrow(dim, 0, size) * first
        for shift, weight in enumerate(rest, 1):
            total.add_(pixels_CHW.narrow(dim, shift, size), alpha=weight)
        pixels_CHW = total
    return pixels_CHW


@functools.cache
def _window() -> tuple[float, ...]:
    """Weights along one side; their sum is 1."""
    weights = [math.exp(-((place - SSIM_WINDOW // 2) ** 2) / (2 * SIGMA**2)) for place in range(SSIM_WINDOW)]
    return tuple(weight / sum(weights) for weight in weights)

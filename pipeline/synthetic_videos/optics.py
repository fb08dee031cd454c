"""Effects of lens, sensor and codec on frames `(T, 3, H, W)` in [0, 1].

Each effect is a function of frames and a generator; `develop` draws which of them a clip gets. Most clips get few: web video reduced to
training size has lost most of its noise and blocks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.synthetic_videos.colours import LUMA
from pipeline.synthetic_videos.fields import power_field, wander


def gaussian(frames_NCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with deviation `sigma` pixels; edges are mirrored."""
    height, width = frames_NCHW.shape[-2:]
    reach = min(max(math.ceil(2.5 * sigma), 1), height - 1, width - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float32) / sigma) ** 2)
    taps /= taps.sum()
    padded = F.pad(frames_NCHW, (reach, reach, reach, reach), mode="reflect")
    down = sum(tap * padded[:, :, i : i + height] for i, tap in enumerate(taps.tolist()))
    return sum(tap * down[..., i : i + width] for i, tap in enumerate(taps.tolist()))


def exposure(frames_T3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change of brightness over the clip, a slow drift or the flicker of lamps; in place."""
    moments = np.arange(len(frames_T3HW), dtype=np.float64)
    drift = wander(rng, moments, 30.0)[:, 0] * rng.uniform(0.01, 0.12)
    if rng.random() < 0.3:
        drift = drift + rng.normal(0, rng.uniform(0.003, 0.03), len(moments))
    return frames_T3HW.mul_(torch.from_numpy(np.exp(drift).astype(np.float32))[:, None, None, None])


def tone(frames_T3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Exposure and grading of the scene: gamma, contrast, lifted blacks; a fifth of all clips are dark."""
    gamma = float(np.exp(rng.normal(0, 0.25)))
    gain = float(np.exp(rng.normal(-0.08, 0.12)))
    if rng.random() < 0.2:
        gamma, gain = gamma * rng.uniform(1.2, 2.0), gain * rng.uniform(0.7, 1.0)
    lift = max(float(rng.normal(0, 0.03)), 0.0)
    frames_T3HW = frames_T3HW.clamp_(0, 1).pow_(gamma).mul_(gain * (1 - lift)).add_(lift)
    if rng.random() < 0.35:  # the S-curve of graded pictures
        bow = float(rng.uniform(0.2, 0.9))
        curve = frames_T3HW.clamp(0, 1)
        frames_T3HW = torch.lerp(frames_T3HW, curve * curve * (3 - 2 * curve), bow)
    return frames_T3HW


def grain(frames_T3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Noise of sensor or film, new in each frame, stronger in bright areas (shot noise), weaker in chroma; in place."""
    T, _, H, W = frames_T3HW.shape
    strength = float(np.exp(rng.uniform(np.log(0.5), np.log(7)))) / 255
    noise = torch.from_numpy(rng.standard_normal((T, 1, H, W), dtype=np.float32))
    if rng.random() < 0.5:  # coarser than a pixel, as scaling and denoising leave it
        noise = sum((torch.roll(noise, shift, (2, 3)) for shift in ((0, 1), (1, 0), (1, 1))), noise)
        noise *= 0.5
    light = frames_T3HW.mean(1, keepdim=True).clamp_(0, 1)
    frames_T3HW.add_(noise * (strength * (0.3 + 0.7 * light.sqrt())))
    if rng.random() < 0.4:
        colour = torch.from_numpy(rng.standard_normal((T, 3, -(-H // 2), -(-W // 2)), dtype=np.float32))
        frames_T3HW.add_(F.interpolate(colour, size=(H, W), mode="bilinear", align_corners=False), alpha=0.5 * strength)
    return frames_T3HW


def soften_chroma(frames_T3HW: torch.Tensor) -> torch.Tensor:
    """Reduces chroma to half resolution, as 4:2:0 video stores it; brightness keeps its detail."""
    H, W = frames_T3HW.shape[-2:]
    luma = (frames_T3HW * torch.from_numpy(LUMA)[None, :, None, None]).sum(1, keepdim=True)
    chroma = F.avg_pool2d(frames_T3HW - luma, 2, ceil_mode=True, count_include_pad=False)
    return F.interpolate(chroma, size=(H, W), mode="bilinear", align_corners=False).add_(luma)


def _cosines(size: int) -> torch.Tensor:
    """Orthonormal DCT-II matrix; rows are frequencies."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return torch.from_numpy(matrix.astype(np.float32))


def quantise(frames_T3HW: torch.Tensor, step: float) -> torch.Tensor:
    """Codec loss: cosine coefficients of 8 x 8 blocks rounded to steps that grow with frequency; `step` is the first."""
    T, C, H, W = frames_T3HW.shape
    padded = F.pad(frames_T3HW, (0, -W % 8, 0, -H % 8), mode="replicate")
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    cosines = _cosines(8)
    blocks = padded.reshape(T, C, rows, 8, columns, 8).permute(0, 1, 2, 4, 3, 5)
    order = torch.arange(8, dtype=torch.float32)
    steps = step * (1 + 0.5 * (order[:, None] + order[None, :]))
    rounded = torch.round(cosines @ blocks @ cosines.T / steps) * steps
    blocks = (cosines.T @ rounded @ cosines).permute(0, 1, 2, 4, 3, 5)
    return blocks.reshape(T, C, rows * 8, columns * 8)[:, :, :H, :W]


def glow(frames_T3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Adds a light in or near the frame: a warm soft spot that drifts slowly; in place."""
    T, _, H, W = frames_T3HW.shape
    moments = np.arange(T, dtype=np.float64)
    centre = (
        rng.uniform(-0.6, 0.6, 2) + 0.04 * wander(rng, moments, 40.0, 2) + np.outer(moments, rng.normal(0, 0.006, 2))
    )
    width = rng.uniform(0.08, 0.6)
    y = torch.linspace(-0.5, 0.5, H)[None, :] - torch.from_numpy(centre[:, :1].astype(np.float32))
    x = torch.linspace(-0.5, 0.5, W)[None, :] - torch.from_numpy(centre[:, 1:].astype(np.float32))
    spot = torch.exp(-0.5 * (y / width) ** 2)[:, None, :, None] * torch.exp(-0.5 * (x / width) ** 2)[:, None, None, :]
    colour = np.array([1.0, rng.uniform(0.6, 1.0), rng.uniform(0.2, 1.0)], np.float32) * rng.uniform(0.1, 0.8)
    return frames_T3HW.add_(spot * torch.from_numpy(colour.astype(np.float32))[None, :, None, None])


def shade(frames_T3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Uneven light: a vignette or broad moving shadows, multiplied; in place."""
    T, _, H, W = frames_T3HW.shape
    if rng.random() < 0.5:
        y, x = torch.linspace(-1, 1, H)[:, None], torch.linspace(-1, 1, W)[None, :]
        return frames_T3HW.mul_(1 - float(rng.uniform(0.1, 0.5)) * (x * x + y * y) / 2)
    shadows = power_field(rng, (T, 8, 8), 1.5, (rng.uniform(1, 6), 1, 1)) * rng.uniform(0.05, 0.25)
    light = F.interpolate(torch.from_numpy(shadows)[:, None], size=(H, W), mode="bicubic", align_corners=False)
    return frames_T3HW.mul_(light.add_(1).clamp_(0.2, 2))


def develop(frames_T3HW: torch.Tensor, rng: np.random.Generator, *, moving: bool) -> torch.Tensor:
    """Applies the effects drawn for this clip; `moving=False` keeps all frames equal."""
    if moving and rng.random() < 0.3:
        frames_T3HW = shade(frames_T3HW, rng)
    if moving and rng.random() < 0.15:
        frames_T3HW = glow(frames_T3HW, rng)
    if moving and rng.random() < 0.25:
        frames_T3HW = exposure(frames_T3HW, rng)
    frames_T3HW = tone(frames_T3HW, rng)
    if rng.random() < 0.2:
        frames_T3HW = gaussian(frames_T3HW, float(np.exp(rng.uniform(np.log(0.4), np.log(1.6)))))
    if moving and rng.random() < 0.45:
        frames_T3HW = grain(frames_T3HW, rng)
    if rng.random() < 0.5:
        frames_T3HW = soften_chroma(frames_T3HW)
    if rng.random() < 0.2:
        frames_T3HW = quantise(frames_T3HW, float(np.exp(rng.uniform(np.log(2), np.log(20)))) / 255)
    return frames_T3HW

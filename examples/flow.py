"""Flow matching on latents: loss of a velocity network, sampling from it, and the random numbers of both.

Rectified flow (Lipman et al.: Flow Matching, arXiv:2210.02747; Liu et al., arXiv:2209.03003): `x_t = (1 - t) x + t noise`, and the
network learns the velocity `noise - x`. Times are logit-normal, shifted towards noise (Esser et al., arXiv:2403.03206). Sampling is
Euler's method from t = 1 to 0, with classifier-free guidance (Ho, Salimans, arXiv:2207.12598).

Every random number is a function of (seed, step, id of the latent): which rank has the latent, and how many there are, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from examples.dit import caption_words

SHIFT = 3.0

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents `BCTHW`, times `B` and words `BS` to velocities `BCTHW`."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of one batch: noise `BCTHW` and times `B`, float32; `drop`: whose captions are left out."""

    noise_BCTHW: Tensor
    time_B: Tensor
    drop: list[bool]


def draw(seed: int, step: int, ids: Sequence[str], like_BCTHW: Tensor, caption_dropout: float) -> Draws:
    """Draws for latents of the shape and device of `like_BCTHW`. A latent's draws depend on seed, step and its id alone."""
    noise, times, drop = [], [], []
    for name in ids:
        generator = generator_of(like_BCTHW.device, seed, step, name)
        noise.append(torch.randn(like_BCTHW.shape[1:], generator=generator, device=like_BCTHW.device))
        times.append(torch.randn((), generator=generator, device=like_BCTHW.device))
        drop.append(uniform_of("caption", seed, step, name) < caption_dropout)
    return Draws(torch.stack(noise), shifted(torch.stack(times).sigmoid()), drop)


def shifted(time: Tensor) -> Tensor:
    """Times in [0, 1] moved towards 1, where the layout of a video is decided: latents of many values show it through much noise."""
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def generator_of(device: torch.device, *values: object) -> torch.Generator:
    """A generator whose seed is a hash of `values`."""
    return torch.Generator(device).manual_seed(_hash(values) >> 1)


def uniform_of(*values: object) -> float:
    """A number in [0, 1) that is a hash of `values`."""
    return _hash(values) / 2**64


def flow_loss(
    network: Velocity, latents_BCTHW: Tensor, captions: Sequence[str | None], draws: Draws, vocabulary: int
) -> Tensor:
    """Mean square error of the velocity, over all values of the batch."""
    kept = [None if dropped else caption for caption, dropped in zip(captions, draws.drop, strict=True)]
    words_BS = caption_words(kept, vocabulary).to(latents_BCTHW.device)
    time = draws.time_B.view(-1, 1, 1, 1, 1)
    noisy_BCTHW = (1 - time) * latents_BCTHW + time * draws.noise_BCTHW
    found_BCTHW = network(noisy_BCTHW, draws.time_B, words_BS)
    return (found_BCTHW.float() - (draws.noise_BCTHW - latents_BCTHW)).square().mean()


@torch.inference_mode()
def sample(
    network: Velocity,
    captions: Sequence[str | None],
    shape: tuple[int, int, int, int],
    vocabulary: int,
    device: torch.device,
    *,
    steps: int = 32,
    guidance: float = 2.0,
    seed: int = 0,
) -> Tensor:
    """Latents `B C T H W` for captions, float32; `shape` is C, T, H, W. `guidance=1` follows the caption without amplifying it."""
    noise = [
        torch.randn(shape, generator=generator_of(device, seed, "sample", n), device=device)
        for n in range(len(captions))
    ]
    latents_BCTHW = torch.stack(noise)
    words_BS = caption_words([*captions, *([None] * len(captions))], vocabulary).to(device)
    for time, following in pairwise(shifted(torch.linspace(1, 0, steps + 1)).tolist()):
        time_B = torch.full((2 * len(captions),), time, device=device)
        found = network(latents_BCTHW.repeat(2, 1, 1, 1, 1), time_B, words_BS).float()
        with_caption, without = found.chunk(2)
        latents_BCTHW = latents_BCTHW + (following - time) * (without + guidance * (with_caption - without))
    return latents_BCTHW


def _hash(values: Sequence[object]) -> int:
    text = "\x1f".join(map(str, values))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

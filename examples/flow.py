"""Flow matching on latents: loss of a network, sampling from it, and the random numbers of both.

Rectified flow (Lipman et al.: Flow Matching, arXiv:2210.02747; Liu et al., arXiv:2209.03003): `x_t = (1 - t) x + t noise`, with velocity
`noise - x`. The network predicts `x`, which has less to say than noise, and the loss is that of the velocity `(x_t - x) / t` (Li, He: Back
to Basics, arXiv:2511.13720). Times are logit-normal, shifted towards noise (Esser et al., arXiv:2403.03206). Sampling is Euler's method
from t = 1 to 0, with classifier-free guidance (Ho, Salimans, arXiv:2207.12598).

Every random number is a function of (seed, step, id of the latent): which rank has the latent, and how many there are, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

SHIFT = 3.0
SMALLEST_TIME = 0.1  # below it errors would weigh more than a hundred times

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents `BCTHW`, times `B` and text (words `BS` or embeddings `BE`) to latents without noise `BCTHW`."""


def draw(seed: int, step: int, ids: Sequence[str], like_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Noise `BCTHW` and times `B`, float32, for latents of the shape and device of `like_BCTHW`."""
    noise, times = [], []
    for name in ids:
        generator = generator_of(like_BCTHW.device, seed, step, name)
        noise.append(torch.randn(like_BCTHW.shape[1:], generator=generator, device=like_BCTHW.device))
        times.append(torch.randn((), generator=generator, device=like_BCTHW.device))
    return torch.stack(noise), shifted(torch.stack(times).sigmoid())


def shifted(time: Tensor) -> Tensor:
    """Times in [0, 1] moved towards 1, where the layout of a video is decided: latents of many values show it through much noise."""
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def generator_of(device: torch.device, *values: object) -> torch.Generator:
    """A generator whose seed is a hash of `values`."""
    text = "\x1f".join(map(str, values))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def flow_loss(network: Denoiser, latents_BCTHW: Tensor, text: Tensor, noise_BCTHW: Tensor, time_B: Tensor) -> Tensor:
    """Mean square error of the velocity, over all values of the batch."""
    time = time_B.view(-1, 1, 1, 1, 1)
    noisy_BCTHW = (1 - time) * latents_BCTHW + time * noise_BCTHW
    found_BCTHW = velocity(network, noisy_BCTHW, time_B, text)
    return (found_BCTHW - (noise_BCTHW - latents_BCTHW)).square().mean()


def velocity(network: Denoiser, noisy_BCTHW: Tensor, time_B: Tensor, text: Tensor) -> Tensor:
    """Velocity `BCTHW`, float32, that leads to the latent which the network sees in a noisy one."""
    latents_BCTHW = network(noisy_BCTHW, time_B, text).float()
    return (noisy_BCTHW - latents_BCTHW) / time_B.clamp(min=SMALLEST_TIME).view(-1, 1, 1, 1, 1)


@torch.inference_mode()
def sample(
    network: Denoiser,
    text: Tensor,
    empty: Tensor,
    shape: Sequence[int],
    *,
    steps: int = 32,
    guidance: float = 1.5,
    seed: int = 0,
) -> Tensor:
    """Latents `BCTHW` for captions, float32. `empty`: the text of as many empty captions; `shape` is CTHW. `guidance=1` follows captions
    without amplifying them. The network is called with all captions, then all empty ones, as one batch.
    """
    count, device = len(text), text.device
    noise = [
        torch.randn(tuple(shape), generator=generator_of(device, seed, "sample", n), device=device)
        for n in range(count)
    ]
    latents_BCTHW = torch.stack(noise)
    both = torch.cat([text, empty])
    for time, following in pairwise(shifted(torch.linspace(1, 0, steps + 1)).tolist()):
        time_B = torch.full((2 * count,), time, device=device)
        with_caption, without = velocity(network, latents_BCTHW.repeat(2, 1, 1, 1, 1), time_B, both).chunk(2)
        latents_BCTHW = latents_BCTHW + (following - time) * (without + guidance * (with_caption - without))
    return latents_BCTHW

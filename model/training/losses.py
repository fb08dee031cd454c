"""Loss terms of the published objectives: scalars with gradients, one small function each.

`model.training.objective` weights and sums them; the perceptual terms are in `model.metrics.perceptual`.

Sources: LeanVAE (ICCV 2025, training objective; spec section 13), WF-VAE (section 3.4, equations 5 to 7; spec section 14), IV-VAE
(supplement 3.1, equation 5; spec section 10), LeCam (Tseng et al. 2021, equation 4), VQGAN (Esser et al. 2021, equation 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from model.leanvae import haar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.posterior import Posterior

COLOURS = 3
ADAPTIVE_EPSILON = 1e-6  # WF-VAE equation 7


def pixel_l1(original_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
    """Mean of |x - y| over all elements (LeanVAE)."""
    return (original_BCTHW - reconstruction_BCTHW).abs().mean()


def pixel_mse(original_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
    """Mean of (x - y)^2, which PSNR measures. No paper uses it: their L1 gives sharper edges and slightly lower PSNR."""
    return (original_BCTHW - reconstruction_BCTHW).square().mean()


def haar_l1(original_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 of Haar coefficients (LeanVAE): (low band, high bands), each the mean over frame 0's 2-D part plus that over the 3-D part.

    Coefficients are the unscaled sums and differences of spec section 3 (signs +1 and -1). An image has no second part.

    Raises:
        ValueError: an even number of frames, or odd sides.
    """
    frames, height, width = original_BCTHW.shape[2:]
    if frames % 2 == 0 or height % 2 or width % 2:
        raise ValueError(f"Haar bands need an odd number of frames and even sides, got {frames} of {height}x{width}")
    difference = original_BCTHW - reconstruction_BCTHW  # the transform is linear
    parts = [haar.analyse(difference[:, :, :1], haar.image_signs()).abs()]
    if frames > 1:
        parts.append(haar.analyse(difference[:, :, 1:], haar.video_signs()).abs())
    low = torch.stack([part[:, :COLOURS].mean() for part in parts]).sum()
    high = torch.stack([part[:, COLOURS:].mean() for part in parts]).sum()
    return low, high


def frame_sum(original_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
    """Sum of |x - y| over a frame's pixels and colours, mean over frames and videos (WF-VAE; IV-VAE's MAE)."""
    B, _, T = original_BCTHW.shape[:3]
    return (original_BCTHW - reconstruction_BCTHW).abs().sum() / (B * T)


def kl_divergence(posterior: Posterior) -> torch.Tensor:
    """KL to the standard normal, summed over all elements of a latent, mean over videos (all three).

    Raises:
        ValueError: the posterior has no log-variance.
    """
    if posterior.logvar is None:
        raise ValueError("KL needs the posterior's log-variance; encode with moments=True")
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / mean.shape[0]


def energy_flow(encoded: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """WL loss (WF-VAE equation 5): sum over levels of |encoder's - decoder's| coefficients, mean over videos.

    Args:
        encoded: `B C t h w` per level, as the encoder's energy flow reads them.
        decoded: the same, as the decoder predicts them.

    Raises:
        ValueError: levels that do not match.
    """
    if (
        len(encoded) != len(decoded)
        or not encoded
        or any(a.shape != b.shape for a, b in zip(encoded, decoded, strict=True))
    ):
        raise ValueError(
            f"coefficients of encoder and decoder must match, got {[tuple(part.shape) for part in encoded]} and "
            f"{[tuple(part.shape) for part in decoded]}"
        )
    return torch.stack([(a - b).abs().sum() for a, b in zip(encoded, decoded, strict=True)]).sum() / encoded[0].shape[0]


# ---- adversarial ----------------------------------------------------------------------------------------------------


def hinge_discriminator(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """Half the sum of mean(max(0, 1 - real)) and mean(max(0, 1 + fake)) (LeanVAE, WF-VAE)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def non_saturating_generator(logits_fake: torch.Tensor) -> torch.Tensor:
    """softplus(-mean logit of a frame), mean over frames (LeanVAE). The first axis is frames."""
    return F.softplus(-logits_fake.flatten(1).mean(1)).mean()


def hinge_generator(logits_fake: torch.Tensor) -> torch.Tensor:
    """-mean logit (WF-VAE)."""
    return -logits_fake.mean()


def hinge_generator_sum(logits_fake: torch.Tensor, frames: int) -> torch.Tensor:
    """-sum of all logits over the number of `frames` they judge, all videos together: a sum over an image, like IV-VAE's other terms."""
    return -logits_fake.sum() / frames


class LeCam(nn.Module):
    """LeCam regulariser: pulls the discriminator's logits towards running means of its past ones (LeanVAE: decay 0.999, weight 0.005).

    The running means are buffers, so checkpoints hold them; they start at zero. A step updates them once, with the means over all its
    micro-batches; until then every micro-batch compares with the running means as its own logits alone would update them.
    """

    real: torch.Tensor
    fake: torch.Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, mean_real: torch.Tensor, mean_fake: torch.Tensor) -> None:
        """Updates the running means with a step's mean logits (scalars)."""
        self.real.copy_(self._updated(self.real, mean_real))
        self.fake.copy_(self._updated(self.fake, mean_fake))

    def forward(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        """mean(max(0, real - running fake)^2) + mean(max(0, running real - fake)^2), for one micro-batch; updates nothing."""
        real, fake = (
            self._updated(running, logits.detach().float().mean())
            for running, logits in ((self.real, logits_real), (self.fake, logits_fake))
        )
        return F.relu(logits_real - fake).square().mean() + F.relu(real - logits_fake).square().mean()

    def _updated(self, running: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return running.lerp(mean.to(running), 1.0 - self.decay)


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor, *, ceiling: float
) -> torch.Tensor:
    """Adaptive weight of the adversarial term: ratio of both terms' gradient norms at the last layer (WF-VAE equation 7).

    Takes two losses that depend on the parameter `last_layer`; keeps their graphs. Returns |grad reconstruction| / (|grad adversarial| +
    1e-6), at most `ceiling`, detached.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = of_reconstruction.norm() / (of_adversarial.norm() + ADAPTIVE_EPSILON)
    return ratio.clamp(0.0, ceiling).detach()

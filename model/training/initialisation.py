"""Initial weights of a LeanVAE: all branches start at zero, so that it is a linear autoencoder, random or of principal components.

Residual NAF layers start as the identity (depthwise kernels and narrowing products are zero, as in Fixup and ReZero), the
bottleneck's unrolled steps make no correction (the last narrowing product of each backward stack is zero), and phi Q = 1, so that
the gradient steps correct nothing either. All of these have gradients at once, the parameters before them from the second step on.
Deep stacks of plain layers without norms on the residual stream train from here without warm-up trouble, and do not stay below
their linear start for long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model.layers import COLOURS
from model.leanvae import haar
from model.leanvae.facts import FRAMES
from model.training.linear import principal

if TYPE_CHECKING:
    from model.leanvae.network import Decoder, Encoder, Network, Stack
    from model.training.linear import BlockComponents, LinearAutoencoder

STEP, THRESHOLD = 0.5, 0.01  # of the unrolled iterations, as in ISTA-Net (Zhang & Ghanem 2018, section 3.3)
LOGVAR = -10.0  # of every latent: a deviation of 0.7 % of the latents' own, small beside the loss of compression
RESIDUAL_FLOOR = 0.1  # directions weaker than this share of the strongest are not amplified further
SHARE = 0.5**0.5  # a latent is the sum of a low and a high token channel, with equal shares
# A token channel's size grows with this power of its size in pixels. With 0 an error in a strong component costs many times one in
# a weak one, with 1 norms see only the strongest; with 1/2 the loss fell from the first steps and ended lowest (of 0, 1/2, 1).
BALANCE = 0.5


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Fills every parameter from the seed. Patch projections are random."""
    generator = torch.Generator().manual_seed(seed)
    bottleneck = network.latent_bottleneck
    for coder in (network.encoder, network.decoder):
        for name in ("video_low_proj", "video_high_proj", "image_low_proj", "image_high_proj"):
            projection = _projection(coder, name)
            _normal(projection.weight, generator)
            projection.bias.zero_()
        for stack in (coder.low_layer, coder.high_layer, coder.fusion_layer):
            _initialise_zero_residual(stack, generator)
    _orthonormal(bottleneck.phi, generator)
    bottleneck.Q.copy_(bottleneck.phi.T)
    for step, threshold in zip(bottleneck.weights, bottleneck.threshold, strict=True):
        step.fill_(STEP)
        threshold.fill_(THRESHOLD)
    for analysis, synthesis in zip(bottleneck.forward_l, bottleneck.backward_l, strict=True):
        _initialise_passthrough(cast("Stack", analysis), generator)
        _initialise_passthrough(cast("Stack", synthesis), generator)
        _narrow(cast("Stack", synthesis), -1).zero_()
    network.std_layer.weight.zero_()
    network.std_layer.bias.fill_(LOGVAR)


@torch.no_grad()
def start_linear(network: Network, linear: LinearAutoencoder) -> None:
    """Makes a freshly initialised network equal to that linear autoencoder: same latents and reconstructions, up to rounding.

    Channel k of the low and of the high tokens carries the two parts of latent k. Further encoder channels read the strongest directions
    that latents do not cover, and further decoder channels would add these back if they held anything.

    Raises:
        ValueError: latent channels or block size differ from the network's, or fewer low or high channels than latents.
    """
    low, high = network.encoder.low_layer, network.encoder.high_layer
    widths = int(_conv(low, 0).weight.shape[0]), int(_conv(high, 0).weight.shape[0])
    latents, side = int(network.latent_bottleneck.phi.shape[0]), _side(network)
    if (linear.latent_channels, linear.side) != (latents, side):
        raise ValueError(
            f"the linear autoencoder has {linear.latent_channels} channels and blocks of side {linear.side}, the network {latents} "
            f"and {side}; fit it with fit_linear(clips, {latents}, side={side})"
        )
    if min(widths) < latents:
        raise ValueError(
            f"a linear start needs l_dim and h_dim of at least latent_dim, got {widths[0]} and {widths[1]} for {latents} latents; "
            "widen them, or start without it"
        )
    strengths = linear.video.decode.norm(dim=0)  # norm of each latent's block of pixels
    weakest = float(strengths.min())
    sizes = (strengths / weakest) ** BALANCE
    bottleneck = network.latent_bottleneck
    bottleneck.phi.zero_()
    bottleneck.Q.zero_()
    for first in (0, widths[0]):
        bottleneck.phi[:, first : first + latents] = torch.diag(SHARE / sizes)
        bottleneck.Q[first : first + latents] = torch.diag(SHARE * sizes)
    for blocks, kind, depth in ((linear.image, "image", 1), (linear.video, "video", FRAMES)):
        _set_projections(network, blocks, sizes, weakest, kind, depth, side)


def _set_projections(
    network: Network, blocks: BlockComponents, sizes: torch.Tensor, weakest: float, kind: str, depth: int, side: int
) -> None:
    """Sets the patch and un-patch projections of frame 0 or of groups; `sizes` are those of the latents' token channels."""
    signs = haar.image_signs() if depth == 1 else haar.video_signs()

    def coefficients(rows_NP: torch.Tensor) -> torch.Tensor:
        bands_N = haar.analyse(rows_NP.reshape(-1, COLOURS, depth, side, side), signs)
        return bands_N.reshape(rows_NP.shape[0], -1)

    bands = signs.shape[0]
    mean = coefficients(blocks.mean[None])[0]
    encode, decode = coefficients(blocks.encode) / bands, coefficients(blocks.decode.T).T
    # covariance of the part of the coefficients that latents do not cover
    transform = coefficients(torch.eye(blocks.mean.shape[0], dtype=torch.float64)).T
    rest = torch.eye(encode.shape[1], dtype=torch.float64) - decode @ encode
    leftover = rest @ (transform @ blocks.covariance @ transform.T) @ rest.T
    split = encode.shape[1] // bands  # coefficients in the low band
    for name, part in ((f"{kind}_low_proj", slice(0, split)), (f"{kind}_high_proj", slice(split, None))):
        patch, unpatch = _projection(network.encoder, name), _projection(network.decoder, name)
        latents, free = encode.shape[0], patch.weight.shape[0] - encode.shape[0]
        variances, directions = principal(leftover[part, part], free)
        deviations = variances.sqrt()
        count = directions.shape[1]
        floor = torch.clamp_min(RESIDUAL_FLOOR * deviations[:1], 1e-6)
        other_sizes = (deviations.maximum(floor) / bands**0.5 / weakest) ** BALANCE
        patch.weight[:latents] = encode[:, part] * sizes[:, None] / SHARE
        patch.weight[latents : latents + count] = (directions / deviations.maximum(floor) * other_sizes).T
        patch.bias.copy_(-(patch.weight.double() @ mean[part]))
        unpatch.weight[:, :latents] = decode[part] / sizes / SHARE
        unpatch.weight[:, latents : latents + count] = directions * deviations / other_sizes
        # channels without a direction are small but not zero, so that they get gradients
        unpatch.weight[:, latents + count :] *= 0.1 * deviations[:1].float()
        unpatch.bias.copy_(mean[part])


def _projection(coder: Encoder | Decoder, name: str) -> nn.Linear:
    return next(module for module in getattr(coder, name) if isinstance(module, nn.Linear))


def _side(network: Network) -> int:
    """Side of a block in pixels, from the size of frame 0's low-band patch."""
    coefficients = _projection(network.encoder, "image_low_proj").weight.shape[1] // COLOURS
    return 2 * round(coefficients**0.5)


def _conv(stack: Stack, index: int) -> nn.Conv3d:
    return cast("Any", stack.dconv_layer[index])["ds_conv"]


def _narrow(stack: Stack, index: int) -> torch.Tensor:
    return cast("Any", stack.ffd_layer[index])[4].weight


def _normal(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Normal weights that preserve the size of their input."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)


def _orthonormal(phi: torch.Tensor, generator: torch.Generator) -> None:
    """Random orthonormal rows."""
    drawn = torch.randn((phi.shape[1], phi.shape[0]), generator=generator, dtype=torch.float64)
    phi.copy_(torch.linalg.qr(drawn).Q.T)


def _layers(stack: Stack, generator: torch.Generator) -> None:
    """Identity norms, widening and narrowing products that preserve size, zero convolutions."""
    for index, ffd in enumerate(stack.ffd_layer):
        norm, widen = cast("Any", ffd)[0], cast("Any", ffd)[1].weight
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        _normal(widen, generator)
        _normal(_narrow(stack, index), generator)
        _conv(stack, index).weight.zero_()
        cast("torch.Tensor", _conv(stack, index).bias).zero_()


def _initialise_zero_residual(stack: Stack, generator: torch.Generator) -> None:
    _layers(stack, generator)
    for index in range(len(stack.ffd_layer)):
        _narrow(stack, index).zero_()


def _initialise_passthrough(stack: Stack, generator: torch.Generator) -> None:
    """Layers without residual whose convolution passes its input on."""
    _layers(stack, generator)
    for index in range(len(stack.ffd_layer)):
        _conv(stack, index).weight[:, :, -1, 1, 1] = 1.0

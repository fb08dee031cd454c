"""Functions shared by the layers of trainable clip networks: frames as batch, float32 under autocast, recomputation, initial weights.

Clips `B C T H W` become channel-last in memory at the first norm (`layer_norm` needs it, and convolutions preserve it), so that
using frames as the batch is a view. Nothing here requires that layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.ivvae.parameters import NormGain

if TYPE_CHECKING:
    from collections.abc import Callable


def per_frame(layer: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Applies a layer for frames `N C H W` to every frame of a clip."""
    y = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x_BCTHW.shape[0], -1)).transpose(1, 2)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in at least float32, for sums and norms of the residual stream."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(layer: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`layer(x, ...)` without autocast: 8-bit pixels, latents and band coefficients would lose bits in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(at_least_float32(x), *arguments)


def recomputed(recompute: bool, block: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`block(x, ...)`; with `recompute` only its input is kept, and it runs again in the backward pass (saves memory, costs time)."""
    if recompute and torch.is_grad_enabled():
        return cast("torch.Tensor", checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False))
    return block(x, *arguments)


def with_zero_gradient(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`x`, with zero gradients for a layer that was not used: data-parallel training and optimizers need a gradient for every parameter."""
    for parameter in layer.parameters():
        x = x + 0.0 * parameter.sum()
    return x


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Fills convolutions and norms with PyTorch's default initialisation, drawn from `seed`.

    Kernels and biases are uniform within +-fan_in^-0.5 (He et al. 2015 with a = sqrt(5)), norms start as the identity, as in both papers'
    code. A convolution passes on a third of its input's variance, so every residual branch starts small (variance 0.1 of the stream), and
    the residual stream of a stack of any depth stays of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and isinstance(module.weight, nn.Parameter):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, NormGain):
            module.gamma.fill_(1.0)

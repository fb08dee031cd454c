"""What layers of trainable clip networks have in common: frames as the batch, arithmetic that autocast leaves alone, running twice, seeds.

Enters: clips `B C T H W` of any memory layout, layers. Leaves: the same clips gone through them, with gradients.

Clips go channel-last in memory from the first norm on (`layer_norm` wants it so, and convolutions keep what they get), which makes frames
as the batch a view. Nothing here asks for that layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.ivvae.parameters import Gain

if TYPE_CHECKING:
    from collections.abc import Callable


def per_frame(layer: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor) -> torch.Tensor:
    """A layer of pictures `N C H W` on a clip."""
    y = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x_BCTHW.shape[0], -1)).transpose(1, 2)


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: sums and norms of the residual stream, whatever the products around them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact(layer: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`layer(x, ...)` untouched by autocast: eight-bit pixels, latents and band coefficients would lose bits in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(wide(x), *arguments)


def twice(recompute: bool, block: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`block(x, ...)`; with `recompute` only its input is kept, and it runs again in the backward pass (memory for time)."""
    if recompute and torch.is_grad_enabled():
        return cast("torch.Tensor", checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False))
    return block(x, *arguments)


def idle(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`x`, and a gradient of zero for a layer that had no part in it, as data-parallel training and optimizers want it."""
    for parameter in layer.parameters():
        x = x + 0.0 * parameter.sum()
    return x


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Fills convolutions and norms as PyTorch does by default, from `seed` and not from the process' generator.

    Kernels and biases are uniform within +-fan_in^-0.5 (He et al. 2015 with a = sqrt(5)), norms begin as the identity. Both papers' code
    leaves it at that. A convolution passes a third of its input's variance on, so every residual branch begins as a small correction
    (variance 0.1 of what it is added to) and stacks of any depth have a residual stream of order one.
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
        elif isinstance(module, Gain):
            module.gamma.fill_(1.0)

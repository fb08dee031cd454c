"""Functions shared by the layers of networks: frames as batch, float32 under autocast, weights in 16 bits, recomputation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager


COLOURS = 3


def per_frame(layer: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Applies a layer for frames `N C H W` to every frame of a clip."""
    y = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x_BCTHW.shape[0], -1)).transpose(1, 2)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in at least float32, for sums and norms of the residual stream."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(layer: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`layer(x, ...)` without autocast: 8-bit pixels, latents and band coefficients would lose bits in bfloat16."""
    with no_autocast(x):
        return layer(at_least_float32(x), *arguments)


def no_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Within: no autocast on the device of `x`. Tensors without memory have none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def own_autocast(layer: nn.Module, x: torch.Tensor) -> AbstractContextManager[Any]:
    """Within: no autocast if the layer's attribute `full_precision` is true, else the caller's."""
    return no_autocast(x) if layer.full_precision else nullcontext()


def for_weights(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` in the type of a layer's weights where that is shorter: a network whose weights have 16 bits multiplies in 16 bits."""
    return x.to(weight.dtype) if weight.dtype.itemsize < x.dtype.itemsize else x


def set_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts a network in place for inference with products in `dtype`: weights of convolutions and linear maps, except in layers (and all
    within them) whose attribute `full_precision` is true. All other floating-point tensors become at least float32.

    Weights of convolutions get channels last in memory, and so do their outputs: norms over channels then read vectors, and frames of a
    clip are views. On a CPU steps of WF-VAE take 0.7 times as long in bfloat16, and as long as before in float32.
    """
    network.to(torch.promote_types(dtype, torch.float32))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            channels_last = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=channels_last)
    _cast_products(network, dtype)


def _cast_products(layer: nn.Module, dtype: torch.dtype) -> None:
    if getattr(layer, "full_precision", False):
        return
    if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
        layer.to(dtype)
    for part in layer.children():
        _cast_products(part, dtype)


def run(blocks: Iterable[nn.Module], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`block(x, ...)` of the blocks in turn, see `recomputed`; a block's attribute `recompute` decides (none: false)."""
    for block in blocks:
        x = recomputed(getattr(block, "recompute", False), block, x, *arguments)
    return x


def recomputed(recompute: bool, block: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`block(x, ...)`; with `recompute` only its input is kept, and it runs again in the backward pass (saves memory, costs time)."""
    if recompute and torch.is_grad_enabled():
        return cast("torch.Tensor", checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False))
    return block(x, *arguments)


def activated(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Norm and SiLU in at least float32, run again in the backward pass: little work, much memory."""
    return recomputed(True, lambda x: F.silu(without_autocast(norm, x)), x)


def with_zero_gradient(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`x`, with zero gradients for a layer that was not used: data-parallel training and optimizers need a gradient for every parameter."""
    for parameter in layer.parameters():
        x = x + 0.0 * parameter.sum()
    return x

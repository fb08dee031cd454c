"""Trainable networks by name, freshly initialised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model.definition import definition
from model.ivvae.layers import NormGain
from model.registry import complete, family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from model.leanvae.network import Network
    from model.reconstruction import Trainable
    from model.training.linear import LinearAutoencoder

FAMILIES = ("leanvae", "wfvae", "ivvae")


def trainable(
    network: str,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    recompute: bool = False,
    linear: LinearAutoencoder | None = None,
) -> Trainable:
    """Trainable `network` (family or preset) with `config` over its published keys, float32 on the CPU.

    Args:
        network: a name listed by `lathe models`.
        config: published keys, which override the preset's.
        seed: of the parameters, which depend on nothing else.
        recompute: blocks keep only their inputs and run again in the backward pass: less memory, about a third more time.
        linear: autoencoder that a LeanVAE starts as (`fit_linear`).

    Raises:
        ValueError: unknown network, one that cannot be trained here, impossible configuration, `linear` for a network that is not
        a LeanVAE.
    """
    family, full = family_of(network).name, complete(network, config)
    if family not in FAMILIES:
        raise ValueError(
            f"{network} is of family {family}, which cannot be trained here; expected one of {', '.join(FAMILIES)}, or a preset of these"
        )
    if linear is not None and family != "leanvae":
        raise ValueError(f"only leanvae can start as a linear autoencoder, got {network} of family {family}")
    if family == "leanvae":
        from model.training.initialisation import initialise, start_linear

        lean = cast("Network", definition(network, full, recompute=recompute))
        initialise(lean, seed)
        if linear is not None:
            start_linear(lean, linear)
        return cast("Trainable", lean)
    made = definition(network, full, recompute=recompute)
    _initialise_convolutions(cast("nn.Module", made), seed)
    return made


@torch.no_grad()
def _initialise_convolutions(network: nn.Module, seed: int) -> None:
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

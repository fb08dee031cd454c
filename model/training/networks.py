"""Trainable networks by name, freshly initialised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from model.definition import definition
from model.registry import complete, family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

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

        made = cast("Network", definition(network, full, recompute=recompute))
        initialise(made, seed)
        if linear is not None:
            start_linear(made, linear)
        return cast("Trainable", made)
    if family == "wfvae":
        from model.layers import initialise as initialise_convolutions

        wfvae = definition(network, full, recompute=recompute)
        initialise_convolutions(cast("nn.Module", wfvae), seed)
        return wfvae
    from model.training.trainable_ivvae import TrainableIVVAE

    return cast("Trainable", TrainableIVVAE(full, seed=seed, recompute=recompute))

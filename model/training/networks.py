"""The networks that can be trained, by name.

Enters: the name of a family or preset, a configuration over it, a seed. Leaves: the network with gradients, freshly initialised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from model.registry import complete, family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from model.training.linear import LinearAutoencoder
    from model.training.reconstruction import Trainable

FAMILIES = ("leanvae", "wfvae", "ivvae")


def trainable(
    network: str,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    recompute: bool = False,
    linear: LinearAutoencoder | None = None,
) -> Trainable:
    """`network` (family or preset) with `config` over its published keys, ready to learn, in float32 on the CPU.

    Args:
        network: as `lathe models` names it.
        config: published keys, over the preset's.
        seed: of the parameters; nothing else decides them.
        recompute: blocks keep only their inputs and run twice: less memory, about a third more time.
        linear: the autoencoder that a LeanVAE begins as (`fit_linear`).

    Raises:
        ValueError: an unknown network, one that cannot be trained here, an impossible configuration, `linear` for another than LeanVAE.
    """
    family, full = family_of(network).name, complete(network, config)
    if family not in FAMILIES:
        raise ValueError(
            f"{network} is of family {family}, which cannot be trained here; families that can: {', '.join(FAMILIES)}, and their presets"
        )
    if linear is not None and family != "leanvae":
        raise ValueError(f"only leanvae begins as a linear autoencoder, got {network} of family {family}")
    if family == "leanvae":
        from model.training.trainable import TrainableLeanVAE

        return cast("Trainable", TrainableLeanVAE(full, seed=seed, linear=linear, recompute=recompute))
    if family == "wfvae":
        from model.training.trainable_wfvae import TrainableWFVAE

        return cast("Trainable", TrainableWFVAE(full, seed=seed, recompute=recompute))
    from model.training.trainable_ivvae import TrainableIVVAE

    return cast("Trainable", TrainableIVVAE(full, seed=seed, recompute=recompute))

"""Networks as published, by name: modules with gradients, over whole videos, in the precision of their weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

import torch

from model.registry import complete, family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from model.reconstruction import Trainable

DEFINED = ("leanvae", "wfvae", "wfvae2", "ivvae")
"""Families with a `network` module. Those of diffusers are defined there."""


def definition(
    name: str,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    recompute: bool = False,
) -> Trainable:
    """The network of a family or preset, with `config` over its published keys; `weights` by published key, strictly. Without them its
    parameters are arbitrary.

    Raises:
        ValueError: unknown name, one that is not defined here, impossible configuration.
        RuntimeError: weights of another configuration.
    """
    family = family_of(name).name
    if family not in DEFINED:
        raise ValueError(
            f"{name} is of family {family}, which diffusers defines; expected one of {', '.join(DEFINED)}, or a preset"
        )
    module = importlib.import_module(f"model.{family}.network")
    device = torch.get_default_device()
    # No time for initial weights, and none of the caller's random numbers. Haar filters are made all the same: `to_empty` would erase them.
    made = module.Network.empty(complete(name, config), recompute=recompute)
    made._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    if weights is not None:
        made.load_state_dict(weights)
    return cast("Trainable", made)

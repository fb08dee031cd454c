"""Optimizers over groups of parameters, and a learning rate that depends on the step alone.

There is no schedule state: at step s of a stage the rate is `learning_rate(stage, s)`, resumed or not.
"""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grad_norm_

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from model.training.recipe import OptimizerRecipe, Stage

TOKEN_LAYERS = ".ffd_layer."  # layers whose matrices `muon` orthogonalises


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate at the stage's step `step` (from 0): linear warm-up, then a half cosine down to the final rate."""
    if step < stage.warm_up:
        return stage.learning_rate * (step + 1) / stage.warm_up
    length = (stage.decay_steps or stage.steps) - 1 - stage.warm_up
    done = min(1.0, (step - stage.warm_up) / length) if length > 0 else 1.0
    fall = stage.learning_rate - stage.final_learning_rate
    return stage.final_learning_rate + fall * 0.5 * (1.0 + cos(pi * done))


class Optimizers:
    """One or two PyTorch optimizers over all parameters of a network, stepped together."""

    def __init__(self, network: nn.Module, recipe: OptimizerRecipe) -> None:
        """Raises ValueError if the recipe asks for `muon` and the network has no token layers."""
        self._recipe, self._parameters = recipe, [p for p in network.parameters() if p.requires_grad]
        matrices = _token_matrices(network) if recipe.name == "muon" else []
        if recipe.name == "muon" and not matrices:
            raise ValueError(f"{type(network).__name__} has no token layers for the optimizer muon; use adamw or adam")
        own = {id(p) for p in matrices}
        others = [p for p in self._parameters if id(p) not in own]
        decayed = {"params": [p for p in others if _mixes(p)], "weight_decay": recipe.weight_decay}
        plain = {"params": [p for p in others if not _mixes(p)], "weight_decay": 0.0}
        groups = [group for group in (decayed, plain) if group["params"]]
        kind = torch.optim.Adam if recipe.name == "adam" else torch.optim.AdamW
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [(kind(groups, lr=0.0, betas=recipe.betas), 1.0)]
        if matrices:
            # scales steps like AdamW's, so that one rate suits both (Liu et al. 2025, section 2.2)
            muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append((muon, recipe.muon_factor))

    def step(self, rate: float) -> None:
        """Updates all parameters and clears their gradients."""
        for optimizer, factor in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def clip(self) -> torch.Tensor:
        """Clips the gradient to the recipe's norm; returns the norm before, non-finite if any gradient is."""
        longest = float("inf") if self._recipe.clip is None else self._recipe.clip
        return clip_grad_norm_(self._parameters, longest)

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {"parts": [optimizer.state_dict() for optimizer, _ in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises ValueError for the state of other optimizers."""
        for (optimizer, _), part in zip(self._parts, state["parts"], strict=True):
            optimizer.load_state_dict(part)


def _mixes(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or kernel; a gain has one value per output, whatever its shape (IV-VAE: `2c 1 1 1`)."""
    return parameter.ndim > 1 and parameter.numel() > parameter.shape[0]


def _token_matrices(network: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in network.named_parameters() if TOKEN_LAYERS in f".{name}" and p.ndim == 2]

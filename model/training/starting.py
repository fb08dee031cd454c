"""Initial network of a run, as its recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from model import checkpoint, registry
from model.training.batches import source_clip
from model.training.inflation import inflate
from model.training.linear import fit_linear
from model.training.networks import trainable
from model.weights import check_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from model.interface import LatentSpec
    from model.reconstruction import Trainable
    from model.training.linear import LinearAutoencoder
    from model.training.recipe import TrainingRecipe
    from model.training.source import ClipSource


def start_network(recipe: TrainingRecipe, source: ClipSource, *, first: bool) -> Trainable:
    """The recipe's network, filled according to its `start`; with `first` false only randomly initialised, because it will be overwritten.

    Raises:
        ValueError: a start that does not fit the network; weights of another network.
    """
    config, start = registry.complete(recipe.network, recipe.config), recipe.start
    linear = _principal(recipe, source) if first and start.linear is not None else None
    network = trainable(recipe.network, config, seed=recipe.seed, recompute=recipe.recompute, linear=linear)
    if not first:
        return network
    if start.weights is not None:
        _fill(network, checkpoint.read(start.weights, want_config=False).weights)
    if start.image is not None:
        if registry.family_of(registry.resolve(recipe.network)).name != "ivvae":
            raise ValueError(f"only an IV-VAE starts from an image VAE, got network {recipe.network!r}")
        _fill(network, inflate(config, checkpoint.read(start.image, want_config=False).weights))
    return network


def to_range(video: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """uint8 pixels as float32 in the network's range."""
    low, high = spec.value_range
    return video.float() * ((high - low) / 255) + low


def to_pixels(video: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Nearest uint8 pixels."""
    low, high = spec.value_range
    return ((video - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def _principal(recipe: TrainingRecipe, source: ClipSource) -> LinearAutoencoder:
    stage, spec = recipe.stages[0], registry.spec(recipe.network, recipe.config)
    group = stage.groups[0]

    def clips() -> Iterator[torch.Tensor]:
        for index in range(recipe.start.linear or 0):
            clip = source_clip(source, index, stage, group)
            yield to_range(clip.video_CTHW[None, :, :, : group.height, : group.width], spec)

    return fit_linear(clips(), spec.latent_channels, side=spec.space_stride)


def _fill(network: Trainable, weights: dict[str, torch.Tensor]) -> None:
    module = cast("nn.Module", network)
    check_keys(network.spec.network, module.state_dict(), weights)
    module.load_state_dict(weights)

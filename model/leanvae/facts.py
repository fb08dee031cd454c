"""LeanVAE's plain facts: configuration keys, published networks and what their latents are. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.family import Family, Preset
from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Mapping


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {value!r}")
    if config["embedding_dim"] != config["l_dim"] + config["h_dim"]:
        raise ValueError(
            f"{name}: embedding_dim must be l_dim + h_dim, got {config['embedding_dim']} and "
            f"{config['l_dim']} + {config['h_dim']}"
        )
    return LatentSpec(
        network=name,
        latent_channels=config["latent_dim"],
        time_stride=4,
        space_stride=8,
        value_range=(-0.5, 0.5),
        causal=True,
        chunking="exact",
        scale={4: 0.7744, 16: 1.0}.get(config["latent_dim"]),  # the authors' constants for the two published widths
        channel_semantics="coefficients of a learned linear projection (compressed sensing); channels are not ordered",
    )


_CONFIG = {
    "embedding_dim": 512,
    "l_dim": 128,
    "h_dim": 384,
    "sep_num_layer": 2,
    "fusion_num_layer": 4,
    "ista_iter_num": 2,
    "ista_layer_num": 2,
}

FAMILY = Family(name="leanvae", module="model.leanvae.vae", keys=("latent_dim", *_CONFIG), describe=_describe)

PRESETS = tuple(
    Preset(
        name=f"leanvae-dim{dim}",
        family="leanvae",
        config={"latent_dim": dim, **_CONFIG},
        published=f"hf://Yumic/LeanVAE/LeanVAE-dim{dim}.ckpt",
        licence="MIT",
        source="https://github.com/westlake-repl/LeanVAE",
    )
    for dim in (4, 16)
)

"""Names of networks and the plain facts about them: configuration, constants, licence, where the published weights lie.

Enters: a name and perhaps a configuration in its published keys. Leaves: a checked configuration and a `LatentSpec`. No torch here, so
that planning, checking options and printing tables cost nothing.

A *preset* is a published network ("leanvae-dim16"). A *family* ("leanvae") is the code behind it and needs an explicit configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. `keys` are the configuration it reads; everything else in a published file (training, tiling) is ignored."""

    name: str
    module: str  # holds `build`, `random_weights` and `NUMERICS`
    keys: tuple[str, ...]
    describe: Callable[[str, Mapping[str, Any]], LatentSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # keys a published file may leave out


@dataclass(frozen=True, slots=True)
class Preset:
    """One published network."""

    name: str
    family: str
    config: Mapping[str, Any]
    published: str  # URI that `load` takes as checkpoint
    licence: str
    source: str  # where its authors describe it


def _describe_leanvae(name: str, config: Mapping[str, Any]) -> LatentSpec:
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


_LEANVAE_CONFIG = {
    "embedding_dim": 512,
    "l_dim": 128,
    "h_dim": 384,
    "sep_num_layer": 2,
    "fusion_num_layer": 4,
    "ista_iter_num": 2,
    "ista_layer_num": 2,
}

FAMILIES: dict[str, Family] = {
    "leanvae": Family(
        name="leanvae",
        module="model.leanvae",
        keys=("latent_dim", *_LEANVAE_CONFIG),
        describe=_describe_leanvae,
    ),
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name=f"leanvae-dim{dim}",
            family="leanvae",
            config={"latent_dim": dim, **_LEANVAE_CONFIG},
            published=f"hf://Yumic/LeanVAE/LeanVAE-dim{dim}.ckpt",
            licence="MIT",
            source="https://github.com/westlake-repl/LeanVAE",
        )
        for dim in (4, 16)
    )
}


def names() -> tuple[str, ...]:
    """Presets, in the order they are best shown."""
    return tuple(PRESETS)


def family_of(name: str) -> Family:
    """The architecture behind a preset or family name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name in PRESETS:
        return FAMILIES[PRESETS[name].family]
    if name in FAMILIES:
        return FAMILIES[name]
    raise ValueError(
        f"unknown network {name!r}; known: {', '.join(PRESETS)}; with an explicit configuration also: {', '.join(FAMILIES)}"
    )


def complete(name: str, *configs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of network `name`: its preset, overridden by each of `configs` in turn, reduced to the keys the family reads.

    Raises:
        ValueError: unknown name, or keys that neither the preset nor any configuration gives.
    """
    family = family_of(name)
    merged: dict[str, Any] = dict(family.defaults)
    if name in PRESETS:
        merged.update(PRESETS[name].config)
    for config in configs:
        merged.update(config or {})
    missing = [key for key in family.keys if key not in merged]
    if missing:
        presets = ", ".join(preset.name for preset in PRESETS.values() if preset.family == family.name)
        raise ValueError(
            f"{name} needs a configuration with {', '.join(family.keys)}; missing: {', '.join(missing)}. "
            f"Give config=, or use a preset: {presets}"
        )
    return {key: merged[key] for key in family.keys}


def spec(name: str, config: Mapping[str, Any] | None = None) -> LatentSpec:
    """The `LatentSpec` of a preset, or of a family with its configuration.

    Raises:
        ValueError: unknown name; configuration incomplete or impossible.
    """
    return family_of(name).describe(name, complete(name, config))

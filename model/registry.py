"""Registry of networks: names, configurations, licences and locations of the published weights.

A *preset* is a published network ("leanvae-dim16"). A *family* ("leanvae") is the code behind it and needs an explicit configuration.
Imports no torch, so that planning, checking options and printing tables stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.diffusers_vae import facts as diffusers_vae
from model.ivvae import facts as ivvae
from model.leanvae import facts as leanvae
from model.wfvae import facts as wfvae
from model.wfvae2 import facts as wfvae2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from model.family import Family, Preset
    from model.interface import LatentSpec

_FACTS = (leanvae, ivvae, wfvae, wfvae2, diffusers_vae)

FAMILIES: dict[str, Family] = {facts.FAMILY.name: facts.FAMILY for facts in _FACTS}
PRESETS: dict[str, Preset] = {preset.name: preset for facts in _FACTS for preset in facts.PRESETS}
_ALIASES: dict[str, str] = {alias: preset.name for preset in PRESETS.values() for alias in preset.aliases}


def names() -> tuple[str, ...]:
    """Names of presets, in display order."""
    return tuple(PRESETS)


def resolve(name: str) -> str:
    """Name of the preset or family that `name`, or the alias `name`, stands for.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    name = _ALIASES.get(name, name)
    if name in PRESETS or name in FAMILIES:
        return name
    raise ValueError(
        f"unknown network {name!r}; known: {', '.join(PRESETS)}; with an explicit configuration also: {', '.join(FAMILIES)}"
    )


def family_of(name: str) -> Family:
    """The architecture behind a preset or family name. Raises ValueError as `resolve`."""
    name = resolve(name)
    return FAMILIES[PRESETS[name].family if name in PRESETS else name]


def is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether `config` gives every key that the family reads: the configuration of a checkpoint then adds nothing.

    Raises:
        ValueError: unknown name.
    """
    keys = family_of(name).keys
    # diffusers saves these two beside all others
    return set(("_class_name", "_diffusers_version") if keys is None else keys) <= config.keys()


def lacking(name: str, *configs: Mapping[str, Any] | None) -> list[str]:
    """Required keys that neither the family's defaults, nor the preset, nor one of `configs` give.

    Raises:
        ValueError: unknown name.
    """
    keys, merged = family_of(name).keys, _merged(name, configs)
    return [key for key in (("_class_name",) if keys is None else keys) if key not in merged]


def complete(name: str, *configs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Configuration of network `name`: its preset, overridden by each of `configs` in turn, reduced to the keys the family reads.

    Raises:
        ValueError: unknown name, or keys that neither the preset nor a configuration gives.
    """
    name, family = resolve(name), family_of(name)
    merged = _merged(name, configs)
    if family.keys is None:
        return merged
    if missing := lacking(name, *configs):
        raise ValueError(
            f"{name} needs a configuration with {', '.join(family.keys)}; missing: {', '.join(missing)}. Give config="
            f"{or_presets(family.name)}"
        )
    return {key: _as_floats(merged[key]) if key in family.floats else merged[key] for key in family.keys}


def or_presets(family: str) -> str:
    """Alternative to a configuration in an error text: names of the family's presets; empty if it has none."""
    presets = ", ".join(preset.name for preset in PRESETS.values() if preset.family == family)
    return presets and f", or the name of a preset: {presets}"


def _as_floats(value: Any) -> Any:
    """`value` with its whole numbers as floats, which JSON writes otherwise; what is not a list is left to `describe`."""
    return [float(one) if type(one) is int else one for one in value] if isinstance(value, list | tuple) else value


def _merged(name: str, configs: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    preset = PRESETS.get(resolve(name))
    merged = {**family_of(name).defaults, **(preset.config if preset else {})}
    for config in configs:
        merged.update(config or {})
    return merged


def embedded(name: str) -> str | None:
    """Checkpoint URI of a preset whose weights ship with this package; None for any other network.

    Raises:
        ValueError: unknown name.
    """
    preset = PRESETS.get(resolve(name))
    published = "" if preset is None else preset.published or ""
    return published if published.startswith("embedded://") else None


def card(name: str) -> dict[str, Any]:
    """Facts about a preset, JSON-ready: its spec, configuration, licence, location of its weights.

    Raises:
        ValueError: not a preset.
    """
    name = resolve(name)
    if name not in PRESETS:
        raise ValueError(f"{name} is a family, not a preset; expected one of: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return {
        "family": preset.family,
        "aliases": list(preset.aliases),
        "frames": spec(name).frames_rule,
        "spec": spec(name).to_dict(),
        "config": dict(preset.config),
        "published": preset.published,
        "licence": preset.licence,
        "source": preset.source,
        "note": preset.note,
    }


def spec(name: str, config: Mapping[str, Any] | None = None) -> LatentSpec:
    """The `LatentSpec` of a preset, or of a family with its configuration.

    ValueError: unknown name, or an incomplete or impossible configuration.
    ValueError: unknown name; configuration incomplete or impossible.
    """
    return family_of(name).describe(resolve(name), complete(name, config))

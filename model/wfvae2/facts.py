"""Facts about WFVAE2: configuration keys and what its latents are. No torch. No weights were published, so there is no preset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.family import Family, LatentPart, Preset
from model.interface import LatentSpec
from model.wfvae.facts import GROUPS, check_choices, check_counts, latent_part

if TYPE_CHECKING:
    from collections.abc import Mapping

COUNTS = (
    *("latent_dim", "encoder_num_resblocks", "encoder_energy_flow_size"),
    *("decoder_num_resblocks", "decoder_energy_flow_size"),
)
CHOICES = {
    "norm_type": ("layernorm", "groupnorm"),
    "t_interpolation": ("trilinear", "nearest"),
    "input_type": ("video",),
}
LAYERS = ("hw", "thw")
BLOCKS = ("ResnetBlock2D", "ResnetBlock3D")
MIDDLE = ("ResnetBlock3D", "AttnBlock3DFix", "AttnBlock3D")

_DEFAULTS = {
    "latent_dim": 8,
    "base_channels": [128, 256, 512],
    "decoder_base_channels": None,
    "layer_type": ["hw", "thw"],
    "layer_res_type": ["ResnetBlock2D", "ResnetBlock3D"],
    "encoder_num_resblocks": 2,
    "encoder_energy_flow_size": 128,
    "decoder_num_resblocks": 3,
    "decoder_energy_flow_size": 128,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
    "input_type": "video",
    "mid_layers_type": ["ResnetBlock3D", "AttnBlock3DFix", "ResnetBlock3D"],
}


def decoder_widths(config: Mapping[str, Any]) -> list[int]:
    """Widths of the decoder, finest first: its own, or the encoder's if it has none."""
    return list(config["decoder_base_channels"] or config["base_channels"])


def _check_list(name: str, config: Mapping[str, Any], key: str, known: tuple[str, ...], length: int | None) -> None:
    value = config[key]
    fits = isinstance(value, (list, tuple)) and len(value) == (length or len(value)) and all(v in known for v in value)
    if not fits or not value:
        many = f"{length} of" if length else "one or more of"
        raise ValueError(f"{name}: config key {key} must be a list of {many} {', '.join(known)}; got {value!r}")


def _check_widths(name: str, config: Mapping[str, Any]) -> None:
    levels = len(config["layer_type"])
    grouped = config["norm_type"] == "groupnorm"
    for key in ("base_channels", "decoder_base_channels"):
        value = config[key]
        if key == "decoder_base_channels" and value is None:
            continue
        whole = isinstance(value, (list, tuple)) and all(type(width) is int and width > 0 for width in value)
        if not whole or len(value) != levels + 1:
            raise ValueError(
                f"{name}: config key {key} must be {levels + 1} whole numbers of at least 1, one more than layers; got {value!r}"
            )
    flows = [config["encoder_energy_flow_size"], config["decoder_energy_flow_size"]]
    wrong = [width for width in (*config["base_channels"], *decoder_widths(config), *flows) if width % GROUPS]
    if grouped and wrong:
        raise ValueError(f"{name}: groupnorm has {GROUPS} groups, widths must be multiples of it, got {wrong}")


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a latent depends on its own and earlier frames only."""
    return config["norm_type"] == "layernorm" and "AttnBlock3D" not in config["mid_layers_type"]


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    check_counts(name, config, COUNTS)
    check_choices(name, config, CHOICES)
    _check_list(name, config, "layer_type", LAYERS, None)
    _check_list(name, config, "layer_res_type", BLOCKS, len(config["layer_type"]))
    _check_list(name, config, "mid_layers_type", MIDDLE, None)
    _check_widths(name, config)
    if config["decoder_num_resblocks"] < 2:
        raise ValueError(
            f"{name}: config key decoder_num_resblocks must be at least 2, got {config['decoder_num_resblocks']}"
        )
    layers = list(config["layer_type"])
    return LatentSpec(
        network=name,
        latent_channels=config["latent_dim"],
        time_stride=2 * 2 ** layers.count("thw"),
        space_stride=2 * 2 ** len(layers),
        value_range=(-1.0, 1.0),
        causal=is_causal(config),
        chunking="exact" if is_causal(config) else "none",
        channel_semantics="posterior mean of a convolutional VAE; channels are not ordered",
    )


_DECODER_KEYS = ("decoder_base_channels", "decoder_num_resblocks", "decoder_energy_flow_size", "t_interpolation")


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    return latent_part(config, _DECODER_KEYS)


FAMILY = Family(
    name="wfvae2",
    module="model.wfvae2.vae",
    keys=tuple(_DEFAULTS),
    describe=_describe,
    latent_part=_latent_part,
    defaults=_DEFAULTS,
)

PRESETS: tuple[Preset, ...] = ()

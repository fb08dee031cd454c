"""Facts about WF-VAE: configuration keys, published networks, what their latents are. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.family import Family, LatentPart, Preset
from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

COUNTS = (
    *("latent_dim", "base_channels", "encoder_num_resblocks", "encoder_energy_flow_hidden_size"),
    *("decoder_num_resblocks", "decoder_energy_flow_hidden_size", "connect_res_layer_num"),
)
CHOICES = {
    "attention_type": ("AttnBlock3DFix", "AttnBlock3D"),
    "use_attention": (True, False),
    "norm_type": ("layernorm", "groupnorm"),
    "t_interpolation": ("trilinear", "nearest"),
}
# Blocks of level 1 (4x in time: plane, 8x: volume) and level 2 (volume), with the published spelling of their keys.
_PLANE = ("Downsample", "HaarWaveletTransform2D", "Upsample", "InverseHaarWaveletTransform2D")
_VOLUME = (
    *("Spatial2xTime2x3DDownsample", "HaarWaveletTransform3D"),
    *("Spatial2xTime2x3DUpsample", "InverseHaarWaveletTransform3D"),
)
_KEY_ENDS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
_LEVEL_KEYS = {level: tuple(f"l{level}_{end}" for end in _KEY_ENDS) for level in (1, 2)}
BLOCKS_4X = dict(zip(_LEVEL_KEYS[1] + _LEVEL_KEYS[2], _PLANE + _VOLUME, strict=True))
BLOCKS_8X = dict(zip(_LEVEL_KEYS[1] + _LEVEL_KEYS[2], _VOLUME + _VOLUME, strict=True))
GROUPS = 32  # groups of groupnorm


def time_stride(config: Mapping[str, Any]) -> int:
    """Frames per latent: 8 if level 1 also halves time, else 4."""
    return 8 if config["l1_dowmsample_block"] == _VOLUME[0] else 4


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a latent depends on its own and earlier frames only; statistics or attention over all frames prevent it."""
    mixing = config.get("use_attention", True) and config["attention_type"] == "AttnBlock3D"
    return config["norm_type"] == "layernorm" and not mixing


def constants(name: str, key: str, value: Any, channels: int) -> float | tuple[float, ...] | None:
    """Configured scale or shift: a number, one number per channel, or None.

    Published files hold four entries whatever the latent's width, an unused default of the class; they are ignored.

    Raises:
        ValueError: neither None, a number nor a list of numbers.
    """
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None:
        return None
    if not entries or any(isinstance(entry, bool) or not isinstance(entry, (int, float)) for entry in entries):
        raise ValueError(f"{name}: config key {key} must be a number or a list of numbers, got {value!r}")
    if len(entries) == 1:
        return float(entries[0])
    return tuple(float(entry) for entry in entries) if len(entries) == channels else None


def check_counts(name: str, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises ValueError unless the values of `keys` are whole numbers of at least 1."""
    for key in keys:
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {value!r}")


def check_choices(name: str, config: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError if a value is not one of the allowed ones."""
    for key, known in choices.items():
        if config[key] not in known:
            raise ValueError(f"{name}: config key {key} must be {' or '.join(map(repr, known))}, got {config[key]!r}")


def _check_levels(name: str, config: Mapping[str, Any]) -> None:
    for level, known in ((1, (_PLANE, _VOLUME)), (2, (_VOLUME,))):
        keys = _LEVEL_KEYS[level]
        got = tuple(config[key] for key in keys)
        if got not in known:
            raise ValueError(
                f"{name}: {', '.join(keys)} must be {' or '.join(', '.join(blocks) for blocks in known)}; got {', '.join(map(str, got))}"
            )


def _check_groups(name: str, config: Mapping[str, Any]) -> None:
    widths = ("base_channels", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size")
    wrong = [f"{key} {config[key]}" for key in widths if config[key] % GROUPS]
    if config["norm_type"] == "groupnorm" and wrong:
        raise ValueError(
            f"{name}: groupnorm has {GROUPS} groups, widths must be multiples of it, got {', '.join(wrong)}"
        )


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    check_counts(name, config, COUNTS)
    check_choices(name, config, CHOICES)
    _check_levels(name, config)
    _check_groups(name, config)
    channels = config["latent_dim"]
    return LatentSpec(
        network=name,
        latent_channels=channels,
        time_stride=time_stride(config),
        space_stride=8,
        value_range=(-1.0, 1.0),
        causal=is_causal(config),
        chunking="exact" if is_causal(config) else "none",
        scale=constants(name, "scale", config["scale"], channels),
        shift=constants(name, "shift", config["shift"], channels),
        channel_semantics="posterior mean of a convolutional VAE; channels are not ordered",
    )


# Defaults of the published class, except scale and shift: without a key there is no recommendation.
_DEFAULTS = {
    "latent_dim": 8,
    "base_channels": 128,
    "encoder_num_resblocks": 2,
    "encoder_energy_flow_hidden_size": 64,
    "decoder_num_resblocks": 2,
    "decoder_energy_flow_hidden_size": 128,
    "connect_res_layer_num": 1,
    "attention_type": "AttnBlock3DFix",
    "use_attention": True,
    "norm_type": "groupnorm",
    "t_interpolation": "nearest",
    "scale": None,
    "shift": None,
    **BLOCKS_4X,
}

_DECODER_KEYS = (
    "decoder_num_resblocks",
    "decoder_energy_flow_hidden_size",
    "connect_res_layer_num",
    "t_interpolation",
    *(key for keys in _LEVEL_KEYS.values() for key in keys if "_upsample_" in key),
)


def latent_part(config: Mapping[str, Any], other_keys: tuple[str, ...]) -> LatentPart:
    """Latent part of both versions: the encoder. Its last convolution gives the means of all channels, then the log-variances."""
    return LatentPart(
        mean=("encoder.",), shared={"encoder.conv_out.": config["latent_dim"]}, other_keys=frozenset(other_keys)
    )


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    return latent_part(config, (*_DECODER_KEYS, "scale", "shift"))


FAMILY = Family(
    name="wfvae",
    module="model.wfvae.vae",
    keys=tuple(_DEFAULTS),
    describe=_describe,
    latent_part=_latent_part,
    defaults=_DEFAULTS,
)

_WIDTHS = {"s": 128, "m": 160, "l": 192}
_ALIASES = {("s", 8): ("wfvae-s",), ("m", 8): ("wfvae-m",), ("l", 16): ("wfvae-l",)}
_PUBLISHED = {("l", 16): "hf://chestnutlzj/WF-VAE-L-16Chn/diffusion_pytorch_model.safetensors"}
_NOTES = {
    ("s", 8): (
        "the shape of Open-Sora Plan 1.3 (encoder energy flow of 64 channels). To load its weights, use the family name `wfvae` with "
        "hf://LanguageBind/Open-Sora-Plan-v1.3.0/vae/merged.ckpt, so that the config.json beside them applies"
    )
}


def _network(size: str, latent: int) -> dict[str, Any]:
    return {
        **{key: value for key, value in _DEFAULTS.items() if key not in ("scale", "shift")},
        "latent_dim": latent,
        "base_channels": _WIDTHS[size],
        "encoder_energy_flow_hidden_size": 64 if (size, latent) == ("s", 8) else 128,
        "norm_type": "layernorm",
        "t_interpolation": "trilinear",
    }


def _preset(name: str, config: dict[str, Any], **more: Any) -> Preset:
    return Preset(
        name=name,
        family="wfvae",
        config=config,
        licence="Apache-2.0",
        source="https://github.com/PKU-YuanGroup/WF-VAE",
        **more,
    )


PRESETS = (
    *(
        _preset(
            f"wfvae-{size}-{latent}ch",
            _network(size, latent),
            published=_PUBLISHED.get((size, latent)),
            aliases=_ALIASES.get((size, latent), ()),
            note=_NOTES.get((size, latent), ""),
        )
        for size in _WIDTHS
        for latent in (4, 8, 16, 32)
    ),
    _preset(
        "wfvae-m-888-32ch",
        {**_network("m", 32), **BLOCKS_8X},
        published=None,
        note=(
            "8x8x8, the shape of Open-Sora Plan 1.5 (weights: LanguageBind/Open-Sora-Plan-v1.5.0 on the Hugging Face hub); "
            "scale and shift come from a file's own configuration"
        ),
    ),
)

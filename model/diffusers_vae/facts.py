"""`LatentSpec` of each VAE class of diffusers, and what reaches its latent, from its configuration. Imports neither torch nor diffusers.

Takes a configuration as diffusers writes it (`config.json`; `_class_name` names the class). Keys that concern layers only are left to
diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.diffusers_vae.classes import BOTH_SIDES, DEFAULTS, DETERMINISTIC, REFUSED, WHOLE_CLIPS
from model.diffusers_vae.presets import PRESETS
from model.diffusers_vae.strides import as_list, strides, whole_number
from model.family import Family, LatentPart
from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAMILY", "PRESETS", "needs_whole_clips"]

# Cosmos has a mean and a deviation for every channel of every latent frame, which `LatentSpec` cannot hold; the configuration does.
_PER_FRAME = "its configuration has latents_mean and latents_std per channel and latent frame"


# FLUX.2 normalises latents folded to patches, which have four times the channels.
_PER_PATCH = "its diffusion models fold 2x2 patches into channels and normalise these by bn.running_mean and bn.running_var of its weights"


def needs_whole_clips(config: Mapping[str, Any]) -> str | None:
    """Why a network of this configuration encodes whole clips only; None if it can be run in chunks."""
    kind = config["_class_name"]
    if kind in WHOLE_CLIPS:
        return WHOLE_CLIPS[kind]
    both_sides = not all(config.get(key, True) for key in ("encoder_causal", "is_causal"))
    return BOTH_SIDES if both_sides and kind in ("AutoencoderKLLTX2Video", "AutoencoderVidTok") else None


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind in REFUSED:
        raise ValueError(f"{name}: {kind} is not supported: {REFUSED[kind]}. Supported: {', '.join(DEFAULTS)}")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(
            f"{name}: the configuration names the class {kind!r} (_class_name); expected one of {', '.join(DEFAULTS)}. "
            "A checkpoint folder of diffusers has it in config.json"
        )
    values = {"_class_name": kind, **{key: config.get(key, default) for key, default in DEFAULTS[kind].items()}}
    _check_pixels(name, values)
    shape = strides(name, values)
    channels = whole_number(name, values, _channels_key(values))
    return LatentSpec(
        network=name,
        latent_channels=channels,
        value_range=(-1.0, 1.0),
        chunking="none" if needs_whole_clips(config) else "exact",
        moments=kind not in DETERMINISTIC,
        **shape,
        **_constants(name, {**config, **values}, channels),
        channel_semantics=_semantics(config, channels),
    )


def _check_pixels(name: str, values: Mapping[str, Any]) -> None:
    key = "input_channels" if "input_channels" in values else "in_channels"
    patches = values["_class_name"] == "AutoencoderKLWan" and values["patch_size"] is not None
    expected, reason = 3 * (whole_number(name, values, "patch_size") if patches else 1) ** 2, ""
    if values["_class_name"] == "AutoencoderKLMochi":
        expected = 15  # RGB and twelve Fourier features of it
    elif not patches:
        reason = ", for videos in RGB"
    if values[key] != expected:
        raise ValueError(f"{name}: config key {key} must be {expected}{reason}; got {values[key]!r}")


def _channels_key(config: Mapping[str, Any]) -> str:
    return next((key for key in ("z_dim", "z_channels") if key in config), "latent_channels")


def _semantics(config: Mapping[str, Any], channels: int) -> str:
    if config["_class_name"] == "AutoencoderKLFlux2":
        return _PER_PATCH
    return _PER_FRAME if _per_frame(config, channels) else ""


# ---- constants for diffusion ----------------------------------------------------------------------------------------


def _constants(name: str, values: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """`scale`, `shift`, `mean` and `std` from the configuration."""
    scale, shift = values.get("scaling_factor"), values.get("shift_factor")
    for key, number in (("scaling_factor", scale), ("shift_factor", shift)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{name}: config key {key} must be a number, got {number!r}")
    if _per_frame(values, channels):
        return {"scale": scale, "shift": shift}
    mean, std = (_per_channel(name, values, key, channels) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise ValueError(f"{name}: latents_mean and latents_std belong together; the configuration gives one of them")
    if mean is not None and scale == 1:
        scale = None  # has no effect beside a mean and a deviation
    return {"scale": scale, "shift": shift, "mean": mean, "std": std}


def _per_frame(config: Mapping[str, Any], channels: int) -> bool:
    """Whether Cosmos' statistics are per channel and frame, which is the default of its class."""
    if config.get("_class_name") != "AutoencoderKLCosmos":
        return False
    mean = config.get("latents_mean", ())
    return isinstance(mean, list | tuple) and len(mean) != channels


def _per_channel(name: str, values: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...] | None:
    """Numbers under `key`, one per channel, or None if there are none."""
    if values.get(key) is None:
        return None
    numbers = as_list(name, values, key)
    if len(numbers) != channels:
        raise ValueError(
            f"{name}: {key} must have one value for each of the {channels} channels, got {len(numbers)}; "
            "set it in the configuration (null if there is none)"
        )
    return tuple(float(number) for number in numbers)


# ---- what reaches the latent ----------------------------------------------------------------------------------------

# Tile sizes, constants for diffusion, and the decoder's output. `force_upcast` is read by diffusers' pipelines only.
_OTHER_KEYS = (
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents"),
    *("out_channels", "force_upcast", "sample_size", "sample_height", "sample_width"),
)
_DECODER_KEYS = {
    "AutoencoderKLWan": ("decoder_base_dim", "scale_factor_temporal", "scale_factor_spatial"),
    "AutoencoderKLQwenImage": (),
    "AutoencoderKLLTX2Video": (
        *("decoder_block_out_channels", "decoder_layers_per_block", "decoder_spatio_temporal_scaling"),
        *(
            "decoder_inject_noise",
            "decoder_causal",
            "decoder_spatial_padding_mode",
            "upsample_type",
            "upsample_residual",
        ),
        *("upsample_factor", "timestep_conditioning", "spatial_compression_ratio", "temporal_compression_ratio"),
    ),
    "AutoencoderKLMagvit": ("up_block_types",),
    "AutoencoderVidTok": ("spatial_us", "tempo_us", "codebook_size"),
    "AutoencoderKLHunyuanVideo15": ("upsample_match_channel",),
    "AutoencoderKLHunyuanVideo": ("up_block_types",),
    "AutoencoderKLCogVideoX": ("up_block_types", "use_post_quant_conv"),
    "AutoencoderKLCosmos": ("decode_block_out_channels",),
    "AutoencoderKLLTXVideo": (
        *("decoder_block_out_channels", "decoder_layers_per_block", "decoder_spatio_temporal_scaling"),
        *("decoder_inject_noise", "decoder_causal", "upsample_residual", "upsample_factor", "timestep_conditioning"),
        *("spatial_compression_ratio", "temporal_compression_ratio"),
    ),
    "AutoencoderKLAllegro": ("up_block_types", "temporal_upsample_blocks", "temporal_compression_ratio"),
    "AutoencoderKLMochi": ("decoder_block_out_channels",),
    "AutoencoderKLTemporalDecoder": (),
    "AutoencoderKLFlux2": (
        *("up_block_types", "decoder_block_out_channels", "use_post_quant_conv"),
        *("batch_norm_eps", "batch_norm_momentum", "patch_size"),
    ),
    "AutoencoderDC": (
        *("decoder_block_types", "decoder_block_out_channels", "decoder_layers_per_block", "decoder_qkv_multiscales"),
        *("decoder_norm_types", "decoder_act_fns", "decoder_in_shortcut", "decoder_conv_act_fn", "upsample_block_type"),
    ),
    "AutoencoderTiny": (
        *("decoder_block_out_channels", "num_decoder_blocks", "upsampling_scaling_factor", "upsample_fn"),
        *("block_out_channels", "latent_magnitude", "latent_shift"),
    ),
    "AutoencoderKL": ("up_block_types", "use_post_quant_conv"),
}
# Their last convolution of the encoder gives mean and log-variance; the others have `quant_conv` after it.
_ENDS_WITH_ENCODER = (
    *("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video", "AutoencoderKLHunyuanVideo15", "AutoencoderVidTok"),
)


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    kind = config["_class_name"]
    channels = config[_channels_key(config)]
    if kind in DETERMINISTIC:
        shared = {}
    elif kind == "AutoencoderKLMochi":
        shared = {"encoder.proj_out.": channels}
    elif kind in _ENDS_WITH_ENCODER or not config.get("use_quant_conv", True):
        shared = {"encoder.conv_out.": channels}  # CogVideoX nests the convolution, with the same prefix
    else:
        shared = {"quant_conv.": channels}
    other_keys = frozenset((*_OTHER_KEYS, *_DECODER_KEYS[kind]))
    return LatentPart(mean=("encoder.", "quant_conv."), shared=shared, other_keys=other_keys)


# diffusers validates the configuration itself: every key is kept
FAMILY = Family(
    name="diffusers",
    module="model.diffusers_vae.vae",
    keys=None,
    describe=_describe,
    latent_part=_latent_part,
    compiles=False,
)

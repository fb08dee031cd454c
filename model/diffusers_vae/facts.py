"""Strides, causality and constants of each diffusers VAE class, derived from its configuration. Imports neither torch nor diffusers.

Takes a configuration as diffusers writes it (`config.json`; `_class_name` names the class), returns a `LatentSpec`. Keys that concern
layers only are left to diffusers. `DEFAULTS` are the classes' defaults of the keys read here; a test compares them with the library.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model.diffusers_vae.presets import MOCHI_MEAN, MOCHI_STD, PRESETS, WAN_21_MEAN, WAN_21_STD
from model.family import Family, LatentPart
from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DEFAULTS", "DETERMINISTIC", "FAMILY", "PRESETS", "WHOLE_CLIPS"]

_EIGHTFOLD = [True, True, True, False]

# Class -> keys read here, with the defaults of the class. Cosmos' own `latents_mean` is left out: see `_PER_FRAME`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "in_channels": 3,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "patch_size": None,
        "latents_mean": WAN_21_MEAN,
        "latents_std": WAN_21_STD,
    },
    "AutoencoderKLHunyuanVideo": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "spatial_compression_ratio": 8,
        "scaling_factor": 0.476986,
    },
    "AutoencoderKLCogVideoX": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "block_out_channels": [128, 256, 256, 512],
        "scaling_factor": 1.15258426,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
    "AutoencoderKLCosmos": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 8,
        "spatial_compression_ratio": 8,
        "scaling_factor": 1.0,
    },
    "AutoencoderKLLTXVideo": {
        "in_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "patch_size_t": 1,
        "spatio_temporal_scaling": _EIGHTFOLD,
        "downsample_type": ["conv"] * 4,
        "encoder_causal": True,
        "scaling_factor": 1.0,
    },
    "AutoencoderKLAllegro": {
        "in_channels": 3,
        "latent_channels": 4,
        "temporal_downsample_blocks": [True, True, False, False],
        "block_out_channels": [128, 256, 512, 512],
        "scaling_factor": 0.13,
    },
    "AutoencoderKLMochi": {
        "in_channels": 15,
        "latent_channels": 12,
        "temporal_expansions": [1, 2, 3],
        "spatial_expansions": [2, 2, 2],
        "scaling_factor": 1.0,
        "latents_mean": MOCHI_MEAN,
        "latents_std": MOCHI_STD,
    },
    "AutoencoderKLTemporalDecoder": {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "scaling_factor": 0.18215,
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
}

# Class -> why it needs whole clips. `tests/model/test_diffusers_chunking.py` proves each.
WHOLE_CLIPS = {
    "AutoencoderKLHunyuanVideo": "its group norms take their statistics over all frames",
    "AutoencoderKLCogVideoX": "its group norms take their statistics over batches of frames that depend on the length of the clip",
    "AutoencoderKLCosmos": "its attention reads every earlier frame of the clip",
    "AutoencoderKLLTXVideo": "diffusers keeps no state between the convolutions of one chunk and the next",
    "AutoencoderKLAllegro": "its group norms and convolutions see the frames before and after",
    "AutoencoderKLMochi": "its attention reads every earlier frame of the clip",
}
DETERMINISTIC = frozenset({"AutoencoderKLCosmos"})  # these give one latent, not a Gaussian

# Cosmos has a mean and a deviation for every channel of every latent frame, which `LatentSpec` cannot hold; the configuration does.
_PER_FRAME = "its configuration has latents_mean and latents_std per channel and latent frame"


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    kind = config.get("_class_name")
    if kind not in DEFAULTS:
        raise ValueError(
            f"{name}: the configuration names the class {kind!r} (_class_name); expected one of {', '.join(DEFAULTS)}. "
            "A checkpoint folder of diffusers has it in config.json"
        )
    values = {key: config.get(key, default) for key, default in DEFAULTS[kind].items()}
    if kind in ("AutoencoderKLMochi", "AutoencoderKLWan"):
        _check_pixels(name, kind, values)
    elif values["in_channels"] != 3:
        raise ValueError(f"{name}: config key in_channels must be 3, for videos in RGB; got {values['in_channels']!r}")
    shape = _SHAPES[kind](name, values)
    channels = _whole(name, values, "z_dim" if "z_dim" in values else "latent_channels")
    return LatentSpec(
        network=name,
        latent_channels=channels,
        value_range=(-1.0, 1.0),
        chunking="none" if kind in WHOLE_CLIPS else "exact",
        moments=kind not in DETERMINISTIC,
        **shape,
        **_constants(name, {**config, **values}, channels),
        channel_semantics=_PER_FRAME if _per_frame(config, channels) else "",
    )


def _check_pixels(name: str, kind: str, values: Mapping[str, Any]) -> None:
    patch = 1 if values.get("patch_size") is None else _whole(name, values, "patch_size")
    expected = 15 if kind == "AutoencoderKLMochi" else 3 * patch * patch  # Mochi: RGB and twelve Fourier features of it
    if values["in_channels"] != expected:
        raise ValueError(f"{name}: config key in_channels must be {expected}, got {values['in_channels']!r}")


# ---- strides --------------------------------------------------------------------------------------------------------


def _wan(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    halvings = len(_list(name, values, "dim_mult")) - 1
    if sum(map(bool, _list(name, values, "temperal_downsample")[:halvings])) != 2:
        raise ValueError(
            f"{name}: AutoencoderKLWan steps through groups of 4 frames, so temperal_downsample must be true for 2 of its first "
            f"{halvings} stages; got {values['temperal_downsample']!r}"
        )
    return {"time_stride": 4, "space_stride": 2**halvings * (values["patch_size"] or 1), "lead_frames": 1}


def _hunyuan(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    # Spatial downsampling comes first and temporal last, at most one of each per block except the last.
    return {**_ratios(name, values), "lead_frames": 1, "causal": False}


def _cogvideox(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time = _whole(name, values, "temporal_compression_ratio")
    return {"time_stride": time, "space_stride": _halved(name, values), "lead_frames": 1, "causal": False}


def _cosmos(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {**_ratios(name, values), "lead_frames": 1}


def _ltx(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time, space = _whole(name, values, "patch_size_t"), _whole(name, values, "patch_size")
    scaling, kinds = _list(name, values, "spatio_temporal_scaling"), _list(name, values, "downsample_type")
    for scales, kind in zip(scaling, kinds, strict=False):
        time *= 2 if scales and kind in ("conv", "temporal", "spatiotemporal") else 1
        space *= 2 if scales and kind in ("conv", "spatial", "spatiotemporal") else 1
    return {"time_stride": time, "space_stride": space, "lead_frames": 1, "causal": bool(values["encoder_causal"])}


def _allegro(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    halvings = sum(map(bool, _list(name, values, "temporal_downsample_blocks")))
    return {"time_stride": 2**halvings, "space_stride": _halved(name, values), "lead_frames": 0, "causal": False}


def _mochi(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time, space = (math.prod(_list(name, values, f"{axis}_expansions")) for axis in ("temporal", "spatial"))
    return {"time_stride": time, "space_stride": space, "lead_frames": 1}


def _image(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"time_stride": 1, "space_stride": _halved(name, values), "lead_frames": 0}


_SHAPES: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLHunyuanVideo": _hunyuan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLCosmos": _cosmos,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLAllegro": _allegro,
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLTemporalDecoder": _image,
    "AutoencoderKL": _image,
}


def _ratios(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time_stride": _whole(name, values, "temporal_compression_ratio"),
        "space_stride": _whole(name, values, "spatial_compression_ratio"),
    }


def _halved(name: str, values: Mapping[str, Any]) -> int:
    return int(2 ** (len(_list(name, values, "block_out_channels")) - 1))


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
    return mean is not None and len(mean) != channels


def _per_channel(name: str, values: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...] | None:
    """Numbers under `key`, one per channel, or None if there are none."""
    if values.get(key) is None:
        return None
    numbers = _list(name, values, key)
    if len(numbers) != channels:
        raise ValueError(
            f"{name}: {key} must have one value for each of the {channels} channels, got {len(numbers)}; "
            "set it in the configuration (null if there is none)"
        )
    return tuple(float(number) for number in numbers)


def _whole(name: str, values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {value!r}")
    return value


def _list(name: str, values: Mapping[str, Any], key: str) -> list[Any]:
    value = values[key]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name}: config key {key} must be a list, got {value!r}")
    return list(value)


# ---- what reaches the latent ----------------------------------------------------------------------------------------

# Tile sizes, constants for diffusion, and the decoder's output. `force_upcast` is read by diffusers' pipelines only.
_OTHER_KEYS = (
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents"),
    *("out_channels", "force_upcast", "sample_size", "sample_height", "sample_width"),
)
_DECODER_KEYS = {
    "AutoencoderKLWan": ("decoder_base_dim", "scale_factor_temporal", "scale_factor_spatial"),
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
    "AutoencoderKL": ("up_block_types", "use_post_quant_conv"),
}


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    kind = config["_class_name"]
    channels = config.get("z_dim", config.get("latent_channels"))
    if kind in DETERMINISTIC:
        shared = {}
    elif kind == "AutoencoderKLMochi":
        shared = {"encoder.proj_out.": channels}
    elif kind == "AutoencoderKLLTXVideo" or not config.get("use_quant_conv", True):
        shared = {"encoder.conv_out.": channels}  # CogVideoX nests the convolution, with the same prefix
    else:
        shared = {"quant_conv.": channels}
    other_keys = frozenset((*_OTHER_KEYS, *_DECODER_KEYS[kind]))
    return LatentPart(mean=("encoder.", "quant_conv."), shared=shared, other_keys=other_keys)


# diffusers validates the configuration itself: every key is kept
FAMILY = Family(
    name="diffusers", module="model.diffusers_vae.vae", keys=None, describe=_describe, latent_part=_latent_part
)

"""Strides, lead frames and causality of each VAE class of diffusers, from its configuration. Imports neither torch nor diffusers.

Takes the keys of `classes.DEFAULTS` with their values in force and `_class_name`; returns fields of `LatentSpec`. Raises ValueError for
values that the class or its adapter cannot run with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GROUP = 4  # frames per step after the first, in the classes that step through a clip themselves


def strides(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`time_stride`, `space_stride`, `lead_frames` and, if False, `causal` of the network `name`."""
    return _STRIDES[values["_class_name"]](name, values)


def whole_number(name: str, values: Mapping[str, Any], key: str) -> int:
    """Positive whole number under `key`, or ValueError."""
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {value!r}")
    return value


def as_list(name: str, values: Mapping[str, Any], key: str) -> list[Any]:
    """Entries of the list under `key`, or ValueError."""
    value = values[key]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name}: config key {key} must be a list, got {value!r}")
    return list(value)


def _wan(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    halvings = len(as_list(name, values, "dim_mult")) - 1
    if sum(map(bool, as_list(name, values, "temperal_downsample")[:halvings])) != 2:
        raise ValueError(
            f"{name}: {values['_class_name']} steps through groups of {GROUP} frames, so temperal_downsample must be true for 2 of its "
            f"first {halvings} stages; got {values['temperal_downsample']!r}"
        )
    return {"time_stride": GROUP, "space_stride": 2**halvings * (values.get("patch_size") or 1), "lead_frames": 1}


def _hunyuan(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    # Spatial downsampling comes first and temporal last, at most one of each per block except the last.
    return {**_ratios(name, values), "lead_frames": 1, "causal": False}


def _causal_ratios(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {**_ratios(name, values), "lead_frames": 1}


def _cogvideox(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time = whole_number(name, values, "temporal_compression_ratio")
    return {"time_stride": time, "space_stride": _halved(name, values), "lead_frames": 1, "causal": False}


def _ltx(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time, space = whole_number(name, values, "patch_size_t"), whole_number(name, values, "patch_size")
    scaling, kinds = as_list(name, values, "spatio_temporal_scaling"), as_list(name, values, "downsample_type")
    for scales, kind in zip(scaling, kinds, strict=False):
        time *= 2 if scales and kind in ("conv", "temporal", "spatiotemporal") else 1
        space *= 2 if scales and kind in ("conv", "spatial", "spatiotemporal") else 1
    return {"time_stride": time, "space_stride": space, "lead_frames": 1, "causal": bool(values["encoder_causal"])}


def _magvit(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = as_list(name, values, "down_block_types")
    if kinds[:-1].count("SpatialTemporalDownBlock3D") != 2:
        raise ValueError(
            f"{name}: AutoencoderKLMagvit steps through groups of {GROUP} frames, so two of down_block_types before the last must be "
            f"SpatialTemporalDownBlock3D; got {kinds!r}"
        )
    return {"time_stride": GROUP, "space_stride": _halved(name, values), "lead_frames": 1}


def _vidtok(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if values["regularizer"] != "kl" or not values["double_z"]:
        raise ValueError(
            f"{name}: AutoencoderVidTok must have regularizer 'kl' and double_z true; got {values['regularizer']!r} and "
            f"{values['double_z']!r}. Quantised ones give indices of a codebook, not continuous latents"
        )
    levels = len(as_list(name, values, "ch_mult"))
    in_space = range(levels - 1) if values["spatial_ds"] is None else as_list(name, values, "spatial_ds")
    in_time = [levels - 2, levels - 3] if values["tempo_ds"] is None else as_list(name, values, "tempo_ds")
    if not all(level in in_space for level in in_time):
        raise ValueError(
            f"{name}: AutoencoderVidTok downsamples in time only where it does in space: tempo_ds must name levels of spatial_ds "
            f"({list(in_space)!r}), got {list(in_time)!r}"
        )
    causal = bool(values["is_causal"])
    return {
        "time_stride": 2 ** len(in_time),
        "space_stride": 2 ** len(in_space),
        "lead_frames": int(causal),
        "causal": causal,
    }


def _allegro(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    halvings = sum(map(bool, as_list(name, values, "temporal_downsample_blocks")))
    return {"time_stride": 2**halvings, "space_stride": _halved(name, values), "lead_frames": 0, "causal": False}


def _mochi(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    time, space = (_product(name, values, f"{axis}_expansions") for axis in ("temporal", "spatial"))
    return {"time_stride": time, "space_stride": space, "lead_frames": 1}


def _product(name: str, values: Mapping[str, Any], key: str) -> int:
    return math.prod(whole_number(name, {key: value}, key) for value in as_list(name, values, key))


def _image(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"time_stride": 1, "space_stride": _halved(name, values), "lead_frames": 0}


def _encoder_stages(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"time_stride": 1, "space_stride": _halved(name, values, "encoder_block_out_channels"), "lead_frames": 0}


_STRIDES: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLHunyuanVideo": _hunyuan,
    "AutoencoderKLHunyuanVideo15": _causal_ratios,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLCosmos": _causal_ratios,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLLTX2Video": _ltx,
    "AutoencoderKLMagvit": _magvit,
    "AutoencoderVidTok": _vidtok,
    "AutoencoderKLAllegro": _allegro,
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLTemporalDecoder": _image,
    "AutoencoderKLFlux2": _image,
    "AutoencoderDC": _encoder_stages,
    "AutoencoderTiny": _encoder_stages,
    "AutoencoderKL": _image,
}


def _ratios(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time_stride": whole_number(name, values, "temporal_compression_ratio"),
        "space_stride": whole_number(name, values, "spatial_compression_ratio"),
    }


def _halved(name: str, values: Mapping[str, Any], key: str = "block_out_channels") -> int:
    return int(2 ** (len(as_list(name, values, key)) - 1))

"""Facts about LeanVAE: configuration keys, published networks, what their latents are. No torch."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from model.family import Family, LatentPart, Preset
from model.interface import LatentSpec
from model.wan_statistics import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD

if TYPE_CHECKING:
    from collections.abc import Mapping

WHOLE_NUMBERS = (
    *("latent_dim", "embedding_dim", "l_dim", "h_dim"),
    *("sep_num_layer", "fusion_num_layer", "ista_iter_num", "ista_layer_num"),
)
PATCH_FRAMES = 2  # coefficient frames of a patch
FRAMES = 2 * PATCH_FRAMES  # video frames of a token; the Haar transform halves them
SOURCE = "https://github.com/westlake-repl/LeanVAE"

# Measured on the shipped network's raw latents of 300 of its training clips.
MINI_MEAN = (
    *(0.0114, -0.0007, 0.0024, -0.0119, -0.0491, -0.0167, 0.0178, 0.0241),
    *(0.0004, 0.0177, -0.0014, -0.0040, 0.0072, 0.0063, -0.0120, -0.0155),
)
MINI_STD = (
    *(1.0881, 0.9994, 1.0902, 1.0899, 0.8693, 1.0423, 1.0675, 1.0831),
    *(1.0649, 1.0559, 1.0394, 1.1173, 1.0302, 0.9989, 1.0722, 1.0488),
)
MINI = "leanvae-mini-dim16"
_STATISTICS = {
    "leanvae-wan21-dim16": (WAN21_MEAN, WAN21_STD),
    "leanvae-wan22-dim48": (WAN22_MEAN, WAN22_STD),
    MINI: (MINI_MEAN, MINI_STD),
}
_SCALES = {4: 0.7744, 16: 1.0}  # the authors' constants for the two published widths

_SENSED = "coefficients of a learned linear projection (compressed sensing); channels are not ordered"
_ALIGNED = "latents that imitate those of {}: a diffusion transformer trained on those takes (z - mean) / std"
_SEMANTICS = {"leanvae-wan21-dim16": _ALIGNED.format("Wan 2.1"), "leanvae-wan22-dim48": _ALIGNED.format("Wan 2.2")}


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    for key in WHOLE_NUMBERS:
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {value!r}")
    if config["embedding_dim"] != config["l_dim"] + config["h_dim"]:
        raise ValueError(
            f"{name}: embedding_dim must be l_dim + h_dim, got {config['embedding_dim']} and "
            f"{config['l_dim']} + {config['h_dim']}"
        )
    mean, std = _STATISTICS.get(name, (None, None))
    if mean is not None and len(mean) != config["latent_dim"]:
        raise ValueError(f"{name} has {len(mean)} latent channels, got latent_dim {config['latent_dim']}")
    side, value_range = _patch_side(name, config["patch_size"]), _range(name, config["value_range"])
    as_published = (side, value_range) == (4, (-0.5, 0.5)) and all(config[key] == _CONFIG[key] for key in _CONFIG)
    return LatentSpec(
        network=name,
        latent_channels=config["latent_dim"],
        time_stride=FRAMES,
        space_stride=2 * side,
        value_range=value_range,
        causal=True,
        chunking="exact",
        scale=_SCALES.get(config["latent_dim"]) if as_published else None,
        mean=mean,
        std=std,
        channel_semantics=_SEMANTICS.get(name, _SENSED),
    )


def _patch_side(name: str, patch: Any) -> int:
    """Side of a patch in wavelet coefficients, which is half of its side in pixels."""
    is_triple = isinstance(patch, (list, tuple)) and len(patch) == 3 and all(type(side) is int for side in patch)
    if not is_triple or patch[0] != PATCH_FRAMES or patch[1] != patch[2] or patch[1] < 1:
        raise ValueError(
            f"{name}: patch_size must be [{PATCH_FRAMES}, n, n] wavelet coefficients (4 frames of 2n x 2n pixels), got {patch!r}"
        )
    return int(patch[1])


def _range(name: str, bounds: Any) -> tuple[float, float]:
    is_pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
    if (
        not is_pair
        or not all(isinstance(bound, (int, float)) and isfinite(bound) for bound in bounds)
        or bounds[0] >= bounds[1]
    ):
        raise ValueError(f"{name}: value_range must be two numbers, black and white, got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


_CONFIG = {
    **{"embedding_dim": 512, "l_dim": 128, "h_dim": 384, "sep_num_layer": 2, "fusion_num_layer": 4},
    **{"ista_iter_num": 2, "ista_layer_num": 2},
}
# Keys the published files omit because the authors' code fixes them; no file has `value_range`.
_FIXED = {"patch_size": [PATCH_FRAMES, 4, 4], "value_range": [-0.5, 0.5]}


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    """Only the decoder iterates: the encoder's latent is one product with `phi`."""
    del config
    return LatentPart(
        mean=("encoder.", "latent_bottleneck.phi"),
        logvar=("std_layer.",),
        other_keys=frozenset({"ista_iter_num", "ista_layer_num"}),
    )


FAMILY = Family(
    name="leanvae",
    module="model.leanvae.vae",
    keys=("latent_dim", *_CONFIG, *_FIXED),
    describe=_describe,
    latent_part=_latent_part,
    defaults=_FIXED,
    floats=("value_range",),
)

_UNPUBLISHED = (
    "no weights are published: load your own checkpoint under this name, so that range and statistics fit. The raw latent is "
    "stored; the authors' own code returns (z - mean) / std"
)

PRESETS = (
    *(
        Preset(
            name=f"leanvae-dim{dim}",
            family="leanvae",
            config={"latent_dim": dim, **_CONFIG},
            published=f"hf://Yumic/LeanVAE/LeanVAE-dim{dim}.ckpt",
            licence="MIT",
            source=SOURCE,
        )
        for dim in (4, 16)
    ),
    Preset(
        name=MINI,
        family="leanvae",
        config={
            **{
                "latent_dim": 16,
                "embedding_dim": 160,
                "l_dim": 40,
                "h_dim": 120,
                "sep_num_layer": 2,
                "fusion_num_layer": 3,
            },
            **{"ista_iter_num": 2, "ista_layer_num": 1},
        },
        published=f"embedded://{MINI}",
        licence="Apache-2.0",
        source=SOURCE,
        note="for demos and tests, not for production: a narrow network, trained on synthetic videos only",
    ),
    Preset(
        name="leanvae-wan21-dim16",
        family="leanvae",
        config={"latent_dim": 16, **_CONFIG, "ista_iter_num": 4, "value_range": [-1.0, 1.0]},
        published=None,
        licence="MIT",
        source=SOURCE,
        note=f"aligned with Wan 2.1 latents (4x8x8, 16 channels); {_UNPUBLISHED}",
    ),
    Preset(
        name="leanvae-wan22-dim48",
        family="leanvae",
        config={
            **{
                "latent_dim": 48,
                "embedding_dim": 768,
                "l_dim": 192,
                "h_dim": 576,
                "sep_num_layer": 3,
                "fusion_num_layer": 5,
            },
            **{"ista_iter_num": 5, "ista_layer_num": 2, "patch_size": [PATCH_FRAMES, 8, 8], "value_range": [-1.0, 1.0]},
        },
        published=None,
        licence="MIT",
        source=SOURCE,
        note=f"aligned with Wan 2.2 TI2V-5B latents (4x16x16, 48 channels); {_UNPUBLISHED}",
    ),
)

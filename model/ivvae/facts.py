"""Facts about IV-VAE: configuration keys, published networks, what their latents are. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.family import Family, LatentPart, Preset
from model.interface import LatentSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

# Values of every published network; others would be another architecture.
_FIXED: dict[str, Any] = {"num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# (z_dim, dim) -> scale, shift of the published networks; constants of the authors' code, not in the files.
_CONSTANTS = {
    (4, 64): (1.3196, 0.1250),
    (8, 64): (1.0940, -0.0322),
    (16, 64): (0.9697, -0.1553),
    (16, 96): (0.7619, -0.0483),
}


def _check(name: str, config: Mapping[str, Any]) -> None:
    for key in ("z_dim", "dim"):
        if not _whole(config[key]):
            raise ValueError(f"{name}: config key {key} must be a whole number of at least 1, got {config[key]!r}")
    if config["z_dim"] % 2:
        raise ValueError(f"{name}: z_dim must be even, half of it per branch, got {config['z_dim']}")
    mult = config["dim_mult"]
    if not isinstance(mult, list | tuple) or len(mult) != 4 or not all(map(_whole, mult)) or mult[2] != mult[3]:
        raise ValueError(
            f"{name}: dim_mult must be four whole numbers of which the last two are equal, got {mult!r}; published: [1, 2, 4, 4]"
        )
    odd = [config["dim"] * factor for factor in mult[1:] if config["dim"] * factor % 2]
    if odd:
        raise ValueError(
            f"{name}: dim times each dim_mult after the first must be even, since upsampling halves it; got {odd[0]}"
        )
    for key, value in _FIXED.items():
        given = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if given != value:
            raise ValueError(
                f"{name}: config key {key} must be {value!r}, as in every published network; got {given!r}"
            )
    for key in ("scale_factor", "shift_factor"):
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name}: config key {key} must be a number or None, got {value!r}")


def _describe(name: str, config: Mapping[str, Any]) -> LatentSpec:
    _check(name, config)
    half = config["z_dim"] // 2
    scale, shift = config["scale_factor"], config["shift_factor"]
    if scale is None and shift is None:
        scale, shift = _CONSTANTS.get((config["z_dim"], config["dim"]), (None, None))
    return LatentSpec(
        network=name,
        latent_channels=config["z_dim"],
        time_stride=4,
        space_stride=8,
        value_range=(-1.0, 1.0),
        causal=True,
        chunking="exact",
        scale=scale,
        shift=shift,
        channel_semantics=f"channels 0..{half - 1}: key-frame (2-D) branch; {half}..{2 * half - 1}: motion (3-D) branch",
    )


def _latent_part(config: Mapping[str, Any]) -> LatentPart:
    """The top-level pair gives each branch's mean, then its log-variance; the head before it mixes all channels."""
    rows = config["z_dim"] // 2
    return LatentPart(
        mean=("encoder.",),
        shared={"conv1.conv_2d.": rows, "conv1.conv_3d.": rows},
        other_keys=frozenset({"scale_factor", "shift_factor"}),
    )


FAMILY = Family(
    name="ivvae",
    module="model.ivvae.vae",
    keys=("z_dim", "dim", "dim_mult", *_FIXED, "scale_factor", "shift_factor"),
    describe=_describe,
    latent_part=_latent_part,
    defaults={"dim_mult": [1, 2, 4, 4], **_FIXED, "scale_factor": None, "shift_factor": None},
)


def _preset(name: str, z: int, dim: int, aliases: tuple[str, ...] = ()) -> Preset:
    return Preset(
        name=name,
        family="ivvae",
        config={"z_dim": z, "dim": dim},
        published=None,  # they are on ModelScope, which `load` cannot fetch from
        licence="see source",
        source="https://github.com/ali-vilab/iv-vae",
        aliases=aliases,
        note=f"weights: ModelScope wpy1999/iv-vae, weights/ivvae_z{z}_dim{dim}.pth; download the file and give it as checkpoint. "
        "The authors' encode returns a sample, (z - shift) * scale; Lathe returns the raw mean and records the constants",
    )


PRESETS = (
    _preset("ivvae-z4", 4, 64, ("ivvae-z4-dim64",)),
    _preset("ivvae-z8", 8, 64, ("ivvae-z8-dim64",)),
    _preset("ivvae-z16", 16, 64, ("ivvae-z16-dim64",)),
    _preset("ivvae-z16-dim96", 16, 96),
)

"""Crops of latents in time: the first frames, which are always valid for a causal network, and windows, which almost never are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.loader.arguments import integer
from pipeline.loader.buckets import Bucket, Shape, merged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.loader.spec import DatasetSpec


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `frames` latent frames. Clips that have fewer are left whole."""

    frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", integer("crop: Prefix", self.frames, 1))


@dataclass(frozen=True, slots=True)
class Window:
    """`frames` latent frames from a place drawn anew in each epoch. Only for networks whose latent frames do not depend on earlier ones."""

    frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", integer("crop: Window", self.frames, 1))


Crop = Prefix | Window


def check_crop(crop: Crop | None, spec: DatasetSpec) -> None:
    """Raises ConfigError for a crop that would not give what the network gives for the cropped video."""
    if crop is None:
        return
    if not isinstance(crop, Prefix | Window):
        raise ConfigError(f"crop: expected Prefix(T) or Window(T) with T >= 1 latent frames, got {crop!r}")
    if isinstance(crop, Prefix) and not spec.causal:
        raise ConfigError(
            f"crop: {spec.network} is not causal: its first latent frames depend on later frames, so that a prefix is not what it gives "
            "for the shorter video; encode clips of the length that you train on (clips.buckets)"
        )
    if isinstance(crop, Window) and spec.context_frames != 0:
        known = "an unknown number of" if spec.context_frames is None else str(spec.context_frames)
        raise ConfigError(
            f"crop: a latent frame of {spec.network} depends on {known} earlier frames, so that a window is not what it gives for the "
            "video from there on; use Prefix, or encode the windows as clips (lathe encode --clips slide:N)"
        )


def cropped(buckets: Mapping[str, Bucket], crop: Crop | None, spec: DatasetSpec) -> dict[str, Bucket]:
    """Buckets by the shape that they have after the crop: those that become equal are one."""
    if crop is None:
        return dict(buckets)
    parts: dict[Shape, list[Bucket]] = {}
    for bucket in buckets.values():
        shape = bucket.shape
        if bucket.grid[0] > crop.frames:
            shape = Shape(spec.pixel_frames(crop.frames), shape.height, shape.width)
        parts.setdefault(shape, []).append(bucket)
    return {
        str(shape): merged(shape, spec.grid(shape.frames, shape.height, shape.width), found)
        for shape, found in parts.items()
    }

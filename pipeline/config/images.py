"""Section `images` of an `EncodeJob`: whether images are encoded, as clips of one frame, and in which sizes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from pipeline.config.clips import check_sizes
from pipeline.config.section import Section, as_list, matching
from pipeline.records import ImagePolicy


class ImageConfig(Section):
    """Images as clips of one frame, in buckets of their own. Crop and variants are those of `clips`."""

    policy: ImagePolicy = "skip"
    """`keep`: images and videos; `skip`: videos; `only`: images. A picture that moves (GIF, APNG, animated WebP or AVIF) is a video."""
    size: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Bucket sizes HEIGHTxWIDTH, or `area:HxW`, as `clips.size`. Empty: the sizes of videos."""
    multiple_of: int | None = Field(None, ge=8)
    """Sides of area-derived buckets are multiples of this many pixels. Default: `clips.multiple_of`."""
    upscale: bool | None = None
    """Enlarge images that are smaller than the bucket. Default: `clips.upscale`."""
    max_aspect: float = Field(4.0, ge=1)
    """Longer side by shorter side; beyond it an image is rejected as `aspect_ratio`, since most of it would be cut off."""
    background: Annotated[str, matching("#[0-9a-fA-F]{6}", "a colour #RRGGBB")] = "#ffffff"
    """Colour behind transparent pixels of images and of animations that Pillow decodes, sRGB."""

    @field_validator("size")
    @classmethod
    def _size(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_sizes(value) if value else value

"""Rules of images for one network: takes the job's sections `images` and `clips`, returns `ClipRules` that have them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import parse_size
from pipeline.errors import ConfigError
from pipeline.records import Bucket, ClipRules, ImageRules
from pipeline.video.clips import check_multiple, check_size

if TYPE_CHECKING:
    from pipeline.config import ClipConfig, ImageConfig


def with_images(rules: ClipRules, images: ImageConfig, clips: ClipConfig, network: str) -> ClipRules:
    """`rules` of videos with those of images; unchanged if the job skips images.

    Raises:
        ConfigError: the network takes no clip of one frame, or no frame of such a size.
    """
    if images.policy == "skip":
        return rules
    if (1 - rules.lead_frames) % rules.time_stride:
        raise ConfigError(
            f"images.policy: {network} takes {rules.time_stride}n frames and cannot encode a single image; use --images skip"
        )
    area, sizes = rules.area, {(bucket.height, bucket.width) for bucket in rules.buckets}
    multiple_of = clips.multiple_of if images.multiple_of is None else images.multiple_of
    if images.size:
        is_area = images.size[0].startswith("area:")
        sizes = {parse_size(text.removeprefix("area:")) for text in images.size}
        area = max(height * width for height, width in sizes) if is_area else None
        sizes = set() if is_area else sizes
    for height, width in sizes:
        check_size("images.size", height, width, rules.space_stride, network)
    if area is not None:
        check_multiple("images", multiple_of, area, rules.space_stride, network)
    colour = images.background
    return replace(
        rules,
        images=ImageRules(
            policy=images.policy,
            buckets=tuple(sorted(Bucket(1, *size) for size in sizes)),
            area=area,
            multiple_of=multiple_of,
            upscale=clips.upscale if images.upscale is None else images.upscale,
            max_aspect=images.max_aspect,
            background=(int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)),
        ),
    )

"""Variants of a clip: which part of the scaled frame each shows, and which are mirrored.

A frame is scaled to cover the bucket; what exceeds it is cut off. Places of random crops are draws of the video's bytes, the clip and the
number of the draw, so that they are the same on every machine, in any order, and for any other number of crops.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from pipeline.records import Bucket, ClipPlan, ClipRules, VideoInfo, stable_hash

if TYPE_CHECKING:
    from pipeline.video.decode.cropping import Window

EDGE = 1  # pixels of the scaled frame inside a black bar's edge, where scaling mixes the bar with the content


def plan_variants(
    index: int,
    start: int,
    start_s: float,
    bucket: Bucket,
    fps: float,
    info: VideoInfo,
    rules: ClipRules,
    inside: Window | None,
) -> list[ClipPlan]:
    """All variants of one clip, numbered from `index`. `inside`: what is inside black bars, in pixels of the displayed frame."""
    scale = _scale(bucket, info) if inside is None else _scale_inside(bucket, inside)
    height = max(bucket.height, round(info.height * scale))
    width = max(bucket.width, round(info.width * scale))
    free = height - bucket.height, width - bucket.width
    places = [(free[0] // 2, free[1] // 2)]
    warnings: tuple[str, ...] = ()
    if inside is not None:
        middle = (inside.top + inside.height / 2) / info.height, (inside.left + inside.width / 2) / info.width
        top, left = round(middle[0] * height - bucket.height / 2), round(middle[1] * width - bucket.width / 2)
        places = [(min(max(top, 0), free[0]), min(max(left, 0), free[1]))]
        warnings = (f"letterbox:{inside}",)
    elif rules.crop == "top":
        places = [(0, free[1] // 2)]
    elif rules.crop == "random":
        places = random_places(free, rules.crops, [info.content_hash, start, str(bucket)])
        if (different := len(set(places))) < rules.crops:
            warnings = (f"random_crops:{different}/{rules.crops}",)
    names = rules.variants
    return [
        ClipPlan(
            index=index + number,
            start=start,
            bucket=bucket,
            fps=fps,
            start_s=start_s,
            scaled_height=height,
            scaled_width=width,
            crop_top=places[number % len(places)][0],
            crop_left=places[number % len(places)][1],
            variant=name,
            variants=len(names),
            warnings=warnings,
        )
        for number, name in enumerate(names)
    ]


def random_places(free: tuple[int, int], crops: int, of: list[str | int]) -> list[tuple[int, int]]:
    """Top and left of `crops` crops of `of`, at most `free` pixels down and right: all different if there are as many places, else all
    places again and again.
    """
    rows, columns = free[0] + 1, free[1] + 1
    drawn: list[int] = []
    for number in count():
        if len(drawn) == min(crops, rows * columns):
            break
        place = int(stable_hash([*of, number], digest_size=8), 16) * rows * columns >> 64
        if place not in drawn:
            drawn.append(place)
    return [divmod(drawn[number % len(drawn)], columns) for number in range(crops)]


def _scale(bucket: Bucket, shown: VideoInfo | Window) -> float:
    """Factor by which `shown` covers the bucket."""
    return max(bucket.height / shown.height, bucket.width / shown.width)


def _scale_inside(bucket: Bucket, inside: Window) -> float:
    """The same, but for a factor of 1 without the outermost pixels."""
    scale = _scale(bucket, inside)
    if scale == 1:
        return scale
    larger = max((bucket.height + 2 * EDGE) / inside.height, (bucket.width + 2 * EDGE) / inside.width)
    return larger if scale > 1 else min(1.0, larger)

"""Section `clips` of an `EncodeJob`: which clips are cut from a video, their sizes, what of the frame they show."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from pipeline.config.section import Section, as_list, matching
from pipeline.records import Bucket


def _as_rate(value: Any) -> Any:
    if isinstance(value, str) and value != "source":
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"expected a number of frames per second or 'source', got {value!r}") from None
    return value


Fps = Annotated[Annotated[float, Field(gt=0, le=1000)] | Literal["source"], BeforeValidator(_as_rate)]


def parse_size(text: str) -> tuple[int, int]:
    """`"256x192"` -> (height 256, width 192)."""
    match = re.fullmatch(r"(\d+)x(\d+)", str(text).strip())
    if not match or not all(int(n) > 0 for n in match.groups()):
        raise ValueError(f"expected HEIGHTxWIDTH such as 256x256, got {text!r}")
    return int(match[1]), int(match[2])


def parse_bucket(text: str) -> Bucket:
    """`"17x256x192"` -> 17 frames, height 256, width 192."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", str(text).strip())
    if not match or not all(int(n) > 0 for n in match.groups()):
        raise ValueError(f"expected FRAMESxHEIGHTxWIDTH such as 17x256x256, got {text!r}")
    return Bucket(int(match[1]), int(match[2]), int(match[3]))


def check_sizes(sizes: tuple[str, ...]) -> tuple[str, ...]:
    """`sizes`, if each is HEIGHTxWIDTH, or the only one `area:HEIGHTxWIDTH`. Raises ValueError otherwise."""
    if len(sizes) > 1 and any(text.startswith("area:") for text in sizes):
        raise ValueError(f"expected area:HxW alone, got {','.join(sizes)!r}")
    for text in sizes:
        parse_size(text.removeprefix("area:"))
    return sizes


class ClipConfig(Section):
    """Which clips are cut from a video."""

    fps: Fps = "source"
    """Sampling rate by presentation time, frames per second, or `source`: every frame."""
    frames: Annotated[tuple[int, ...], BeforeValidator(as_list)] = (17,)
    """Clip lengths in frames of the sampling grid, which the network must take (4n+1). The longest that fits a video is used."""
    size: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ("256x256",)
    """Bucket sizes HEIGHTxWIDTH; of several, that of the nearest aspect ratio is used. `area:HxW` derives one per video: at most that many
    pixels, the nearest aspect ratio, sides that are multiples of `multiple_of`."""
    buckets: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """List of FRAMESxHEIGHTxWIDTH; replaces `frames` and `size`."""
    multiple_of: int = Field(16, ge=8)
    """Sides of area-derived buckets are multiples of this many pixels."""
    select: Annotated[
        str,
        matching(
            r"slide:[1-9]\d*|spans|(spans:)?(head|tile|whole|uniform:[1-9]\d*)",
            "head, tile, whole, slide:STRIDE, uniform:N, or spans, which may be followed by :head, :tile, :whole or :uniform:N",
        ),
    ] = "head"
    """`head`, `tile`, `slide:STRIDE` (frames), `uniform:N` (clips), `whole` (the full video as one latent). `spans`: inside each annotated
    span of the video, its `head` or what follows: `spans:tile`, `spans:whole`, `spans:uniform:N`. See `docs/inputs.md`."""
    spans_field: Annotated[str, Field(min_length=1)] = "clips"
    """Field of a sample's metadata, or column of a table, that lists its spans: `{start, end, caption, …}` or `[start, end]`."""
    spans_unit: Literal["seconds", "frames"] = "seconds"
    """Unit of a span's `start` and `end` where they are plain numbers. Timecodes (`00:01:02.500`) are times in either case."""
    crop: Annotated[
        str,
        matching(
            r"center|top|letterbox|random:([1-9]|[1-5]\d|6[0-4])",
            "center, top, letterbox or random:K with K of 1 to 64",
        ),
    ] = "center"
    """What is left of a frame that was scaled to cover its bucket: its `center`, its `top`, `random:K` (K variants of each clip, each at a
    place of its own, the same in every build), or `letterbox`: black bars are cut off first, then the centre is taken."""
    variants: Annotated[tuple[Literal["flip"], ...], BeforeValidator(as_list)] = ()
    """More rows of each clip: `flip` encodes it mirrored left to right as well. Column `variant`; the loader chooses."""
    upscale: bool = False
    """Enlarge sources that are smaller than the bucket. Otherwise they are rejected as `too_small`."""
    min_fps_ratio: float = Field(0.9, ge=0, le=1)
    """Reject a source slower than this fraction of `fps` as `fps_too_low`, instead of repeating its frames."""

    @property
    def in_spans(self) -> bool:
        """Whether clips are cut inside annotated spans."""
        return self.select.startswith("spans")

    @field_validator("size")
    @classmethod
    def _size(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one HEIGHTxWIDTH")
        return check_sizes(value)

    @field_validator("frames")
    @classmethod
    def _frames(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError(f"expected frame counts of at least 1, got {list(value)}")
        return value

    @field_validator("buckets")
    @classmethod
    def _buckets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_bucket(text)
        return value

"""Records of an opened video: its properties, clips, frame chunks and latents. Frozen, picklable values; large arrays are not printed.

Dimensions: T frames, H W pixels, C channels; t h w the latent grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.records.members import is_mask
from pipeline.records.video_counts import VideoCounts, video_counts

if TYPE_CHECKING:
    import numpy as np

    from pipeline.records.inputs import Reject, Sample

BASE, FLIP = "base", "flip"
"""Variants of a clip: as it is, mirrored left to right. Others are `crop1`, `crop1-flip`, …; docs/formats.md lists them."""
_VARIANT = re.compile(r"-(flip|crop[0-9]+(-flip)?)$")

# Storage dtypes of latents and the numpy dtype that holds each. numpy has no bfloat16: uint16 holds its bits.
LATENT_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Clip size: frames x height x width in pixels. `frames` is 0 if the clip is a whole video."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames or 'n'}x{self.height}x{self.width}"

    @property
    def name(self) -> str:
        """`v17x256x256`; `vnx256x256` where clips are whole videos. A folder name and the `bucket` column."""
        return f"v{self}"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video as displayed: sizes after rotation and sample aspect ratio, times in seconds from the first shown frame."""

    codec: str
    pixel_format: str
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int  # degrees clockwise, applied for display: 0, 90, 180, 270
    sample_aspect: tuple[int, int]
    fps: float  # average over the shown frames
    num_frames: int
    duration_s: float
    color_matrix: str  # "bt601" | "bt709" | "bt2020nc": converts its planes to RGB
    color_range: str  # as tagged: "limited" | "full" | "untagged"
    content_hash: str  # BLAKE2b-128 of the encoded bytes, hex
    warnings: tuple[str, ...] = ()  # e.g. "untagged_color:bt709", "deinterlaced"
    is_image: bool = False  # a still picture: one frame, fps and duration 0

    def __post_init__(self) -> None:
        sizes = (self.width, self.height, self.coded_width, self.coded_height, self.num_frames, *self.sample_aspect)
        if min(sizes) < 1 or self.rotation not in (0, 90, 180, 270) or not (self.fps >= 0 and self.duration_s >= 0):
            raise ValueError(
                f"VideoInfo wants sizes, frames and sample aspect of at least 1, a rotation of 0, 90, 180 or 270 degrees, and fps and "
                f"duration of at least 0, got {self}"
            )

    def counted(self) -> VideoCounts:
        """The video as counts by length and size."""
        return video_counts(self.width, self.height, None if self.is_image else self.duration_s)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The job's image section, resolved for one network that takes clips of one frame."""

    policy: Literal["keep", "only"]
    buckets: tuple[Bucket, ...]  # explicit list, of one frame; empty when `area` is set
    area: int | None  # pixels of a derived bucket
    multiple_of: int
    upscale: bool
    max_aspect: float  # longer side by shorter side
    background: tuple[int, int, int]  # sRGB, 0 to 255; seen through transparent pixels


@dataclass(frozen=True, slots=True)
class ClipRules:
    """The job's clip section, resolved for one network: the input of `video.clips.choose_clips`."""

    select: Literal["head", "tile", "slide", "uniform", "whole"]
    select_arg: int  # stride in frames for slide, number of clips for uniform, else 0
    fps: float | None  # None: every source frame
    frame_counts: tuple[int, ...]  # used with `area`; ascending
    buckets: tuple[Bucket, ...]  # explicit list; empty when `area` is set
    area: int | None  # pixels of a derived bucket
    multiple_of: int
    upscale: bool
    min_fps_ratio: float
    time_stride: int  # frames must be time_stride * n + lead_frames
    space_stride: int
    lead_frames: int = 1  # frames the network codes alone at the start: 1 or 0
    crop: Literal["center", "top", "random", "letterbox"] = "center"
    crops: int = 0  # of each clip, with `random`
    flip: bool = False  # each clip mirrored as well
    spans: bool = False  # the rule holds inside each annotated span, not inside the video
    spans_field: str = ""  # of a sample's metadata, with the spans
    spans_unit: str = ""  # of plain numbers in it: "seconds" or "frames"
    images: ImageRules | None = None  # None: images are not encoded

    def of_images(self) -> ClipRules:
        """The rules of an image, which is a clip of one frame in buckets of its own. Crop and variants are those of videos.

        Raises:
            ValueError: images are not encoded.
        """
        if self.images is None:
            raise ValueError("ClipRules has no rules for images")
        return replace(
            self,
            select="head",
            select_arg=0,
            fps=None,
            frame_counts=(1,),
            buckets=self.images.buckets,
            area=self.images.area,
            multiple_of=self.images.multiple_of,
            upscale=self.images.upscale,
            spans=False,
        )

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of every clip, in the order of their rows."""
        crops = [f"crop{number}" for number in range(1, self.crops + 1)] or [BASE]
        flips = [FLIP if name == BASE else f"{name}-{FLIP}" for name in crops] if self.flip else []
        return (*crops, *flips)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, part of the fingerprint. Without options that were added later and are not used: the fingerprint of a job
        that does not use them stays the same.
        """
        found = asdict(self)
        unused: dict[str, Any] = {"crop": "center", "crops": 0, "flip": False, "images": None}
        unused |= {"spans": False, "spans_field": "", "spans_unit": ""}
        for name, value in unused.items():
            if found[name] == value:
                del found[name]
        return found


def variant_names(fingerprint_parts: dict[str, Any]) -> tuple[str, ...]:
    """Variants of each clip in data of a fingerprint, in the order of their rows."""
    return tuple(fingerprint_parts.get("variant", BASE).split(","))


def split_id(name: str) -> tuple[str, str]:
    """Id of a row -> what the variants of its clip have in common, name of the variant."""
    found = _VARIANT.search(name)
    return (name, BASE) if found is None else (name[: found.start()], found[1])


def is_mirrored(variant: str) -> bool:
    """Whether the frames of a variant are mirrored left to right."""
    return variant == FLIP or variant.endswith(f"-{FLIP}")


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """One variant of a clip to cut: frames `[start, start + bucket.frames)` on the video's sampling grid, scaled to cover and cropped."""

    index: int  # among all that is cut from the video, variants included
    start: int
    bucket: Bucket  # frames 0: up to the end of the video, trimmed to a length that the network takes
    fps: float  # of the sampling grid
    start_s: float
    scaled_height: int  # after scale-to-cover, before the crop
    scaled_width: int
    crop_top: int
    crop_left: int
    variant: str = BASE
    variants: int = 1  # of the clip; their indexes follow each other
    warnings: tuple[str, ...] = ()  # of this clip, in addition to the video's
    span: int | None = None  # number of the annotated span it is cut from
    stop: int | None = None  # position of the sampling grid where that span ends; None: the end of the video

    @property
    def clip_index(self) -> int:
        """Number of the clip in its video: its variants share it."""
        return self.index // self.variants

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged after the crop."""
        return is_mirrored(self.variant)

    def __post_init__(self) -> None:
        inside = self.crop_top >= 0 and self.crop_top + self.bucket.height <= self.scaled_height
        inside = inside and self.crop_left >= 0 and self.crop_left + self.bucket.width <= self.scaled_width
        if min(self.index, self.start, self.start_s) < 0 or not self.fps >= 0 or not inside:
            raise ValueError(
                f"ClipPlan wants index, start and fps of at least 0 and a crop inside the scaled frame, got {self}"
            )


@dataclass(frozen=True, slots=True)
class OpenedVideo:
    """Answer of a decoder to `open`: the video's properties, the clips that will follow, and the rejects so far."""

    info: VideoInfo
    clips: tuple[ClipPlan, ...]
    rejects: tuple[Reject, ...]


@dataclass(frozen=True, slots=True)
class StillOpening:
    """Answer of a decoder that looks through a video for black bars: it goes on with the next `pull`."""


ChunkShape = tuple[bool, int, int, int]
"""(first chunk of its clip, frames, height, width). Chunks of one shape can be stacked into a batch."""


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """The next frames of a clip: uint8 YUV 4:4:4 planes, limited range, at bucket size.

    The first chunk of a clip has 4n+1 frames, later ones 4n (4 and 1 are the network's time stride and lead frames).
    """

    clip: int
    planes_T3HW: np.ndarray = field(repr=False)  # uint8, C-contiguous, rows Y, U, V
    pts_s: tuple[float, ...]  # source time of each frame
    color_matrix: str
    first: bool
    last: bool
    damaged: int = 0  # frames that the decoder concealed or repeated, with `decode.damage` "warn"
    first_frame: bytes | None = field(
        default=None, repr=False
    )  # of a first chunk, where it is stored: a lossless image file
    member: str = ""  # name of the paired video it is of; empty: the main one
    masks: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # float32 `(1, t, h, w)`, 0 to 1, by name

    def __post_init__(self) -> None:
        planes = self.planes_T3HW
        if (
            planes.ndim != 4
            or planes.shape[1] != 3
            or planes.dtype.name != "uint8"
            or len(self.pts_s) != planes.shape[0]
        ):
            raise ValueError(
                f"FrameChunk wants uint8 planes (T, 3, H, W) and T times, got {planes.dtype} {planes.shape}, {len(self.pts_s)} times"
            )

    @property
    def shape(self) -> ChunkShape:
        """Chunks of one shape can be stacked into a batch."""
        frames, _, height, width = self.planes_T3HW.shape
        return self.first, frames, height, width

    @property
    def nbytes(self) -> int:
        """Bytes held by the planes."""
        return int(self.planes_T3HW.nbytes)


@dataclass(frozen=True, slots=True)
class ClipFailed:
    """A clip that `OpenedVideo` listed and that cannot be finished, because the stream broke. `reject` is recorded."""

    clip: int
    reject: Reject


@dataclass(frozen=True, slots=True)
class VideoEnded:
    """End of a video: no chunk follows. `frames_decoded` counts frames that left the codec, `decode_s` is the decoder's CPU time."""

    frames_decoded: int
    decode_s: float


@dataclass(frozen=True, slots=True)
class LatentClip:
    """A finished clip. Tensors are `(C, t, h, w)`, unscaled, in the numpy dtype of `LATENT_DTYPES[dtype]`. They may be memory-mapped."""

    id: str  # [A-Za-z0-9_-], unique in the output
    sample: Sample
    info: VideoInfo
    plan: ClipPlan
    num_frames: int
    end_s: float
    latent_CTHW: np.ndarray = field(repr=False)
    logvar_CTHW: np.ndarray | None = field(repr=False)
    dtype: str  # float16 | bfloat16 | float32
    cond_CTHW: np.ndarray | None = field(default=None, repr=False)  # of the first frame followed by zeros
    first_frame: bytes | None = field(default=None, repr=False)  # a lossless image file of bucket size
    members: dict[str, np.ndarray] = field(
        default_factory=dict, repr=False
    )  # of paired videos by name; masks `(1, t, h, w)`

    def __post_init__(self) -> None:
        latent = self.latent_CTHW
        if self.dtype not in LATENT_DTYPES:
            raise ValueError(f"LatentClip wants a dtype of {', '.join(LATENT_DTYPES)}, got {self.dtype!r}")
        wanted = LATENT_DTYPES[self.dtype]
        if latent.ndim != 4 or not latent.size or latent.dtype.str != wanted:
            raise ValueError(
                f"LatentClip of {self.dtype} wants a latent (C, t, h, w) of numpy {wanted}, got {latent.dtype.str} {latent.shape}"
            )
        others = {"log-variance": self.logvar_CTHW, "condition": self.cond_CTHW, **self.members}
        for name, other in others.items():
            shape = (1, *latent.shape[1:]) if name in self.members and is_mask(name) else latent.shape
            if other is not None and (other.shape, other.dtype) != (shape, latent.dtype):
                raise ValueError(
                    f"LatentClip wants a {name} like its latent, {latent.dtype.str} {shape}, "
                    f"got {other.dtype.str} {other.shape}"
                )
        if self.num_frames < 1 or not math.isfinite(self.end_s):
            raise ValueError(
                f"LatentClip wants at least 1 frame and a finite end, got {self.num_frames}, {self.end_s} s"
            )

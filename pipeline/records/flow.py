"""Records of the data flow, from a listed object to a latent clip. Frozen, picklable values; those that reach disk check themselves.

    Shard of SourceObjects → Sample → OpenedVideo, FrameChunks → LatentClip
    any stage → Reject → Receipt          (every input that is not encoded gets a Reject)

Dimensions: T frames, H W pixels, C channels; t h w the latent grid.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import PolicyReject

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from pipeline.errors import BadDataError

# Suffixes of video files, in a corpus folder and in a tar. Of several videos of one sample the one listed first here is encoded.
# Each belongs to a format of `FORMATS` in `pipeline.video.decode.container`.
# Suffixes that usually mean something else (ogg, mod, avs) are not listed.
VIDEO_EXTENSIONS = (
    "mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "m2ts", "mts", "wmv", "flv", "ogv", "3gp", "3g2",
    "vob", "mxf",
    "h264", "264", "h265", "265", "hevc", "ivf", "obu", "y4m",
    "qt", "mqv", "f4v", "mp4v", "mpg4", "insv", "3gpp", "3gp2", "ismv", "cmfv", "mj2", "mjp2", "mk3d", "divx", "xvid",
    "amv", "asf", "wm", "dvr-ms", "ogm", "ogx", "gif", "apng",
    "m2t", "m2p", "m1v", "m2v", "mpv", "mp2v", "mpv2", "mpe", "tp", "trp", "tod", "evo", "vro", "dv", "dif", "gxf",
    "nut", "rm", "rmvb", "rv", "wtv", "nsv",
    "avc", "h26l", "vvc", "h266", "266", "av1", "h263", "263", "vc1", "mjpeg", "mjpg", "cavs", "drc",
)  # fmt: skip


# Storage dtypes of latents and the numpy dtype that holds each. numpy has no bfloat16: uint16 holds its bits.
LATENT_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}


def stable_hash(value: Any, digest_size: int = 16) -> str:
    """Hex BLAKE2b of the canonical JSON of `value`. It is the same on every machine, Python version and run."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=digest_size).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Clip size: frames x height x width in pixels. `frames` is 0 if the clip is a whole video."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames or 'n'}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object of the corpus, as it was listed. `size` in bytes; `etag` is the store's, or `mtime_ns-size` for a local file."""

    uri: str
    size: int
    etag: str

    def __post_init__(self) -> None:
        if not self.uri or self.size < 0:
            raise ValueError(f"SourceObject wants a URI and a size of at least 0 bytes, got {self.uri!r}, {self.size}")


@dataclass(frozen=True, slots=True)
class RetriedSample:
    """A rejected sample that is encoded again, and the counts of it in earlier receipts, which no longer apply."""

    uri: str
    key: str
    damaged: bool
    clips_rejected: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Rejected samples of a finished shard that are encoded again.

    A retry adds to one receipt, its base. It counts only together with that receipt. Clip ids use the etags of the base.
    """

    base: str  # shard id
    base_attempt: str
    samples: tuple[RetriedSample, ...]  # sorted
    after: tuple[str, ...]  # shard ids of earlier retries of this base, sorted
    etags: tuple[tuple[str, str], ...] = ()  # (uri, etag) of objects that now have another etag, but the same bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work: one tar, or a group of plain video files (`kind="files"`). With `retry`, only some samples of it."""

    kind: Literal["tar", "files"]
    name: str
    objects: tuple[SourceObject, ...]
    retry: Retry | None = None

    def __post_init__(self) -> None:
        if not self.objects or (self.kind == "tar" and len(self.objects) != 1):
            raise ValueError(f"shard {self.name!r} of kind {self.kind!r} has {len(self.objects)} objects")

    @property
    def num_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(source.size for source in self.objects)

    def id(self, fingerprint: str) -> str:
        """32 hex digits. They change if an object, the job's fingerprint or the retried samples change."""
        parts = {"objects": [asdict(source) for source in self.objects], "fingerprint": fingerprint}
        return stable_hash(parts if self.retry is None else {**parts, "retry": asdict(self.retry)})


def retry_from_dict(raw: dict[str, Any]) -> Retry:
    """Inverse of `asdict`, from values read back from JSON."""
    samples = tuple(RetriedSample(**sample) for sample in raw["samples"])
    etags = tuple((uri, etag) for uri, etag in raw["etags"])
    return Retry(raw["base"], raw["base_attempt"], samples, tuple(raw["after"]), etags)


def shard_from_dict(raw: dict[str, Any]) -> Shard:
    """Inverse of `asdict`, from values read back from JSON. Raises KeyError, TypeError or ValueError if `raw` is not a shard."""
    retry = raw.get("retry")
    return Shard(
        raw["kind"],
        raw["name"],
        tuple(SourceObject(**source) for source in raw["objects"]),
        retry and retry_from_dict(retry),
    )


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """The part of a sample that is sent to a decoder. Captions and metadata are not: they may be huge, or too deeply nested to pickle."""

    key: str
    uri: str
    video: bytes | str  # as `Sample.video`
    span: tuple[int, int] | None = None  # as `Sample.span`

    def __repr__(self) -> str:
        size = f"{len(self.video)} bytes" if isinstance(self.video, bytes) else self.video
        return f"EncodedVideo({self.key!r}, video={size})"


@dataclass(frozen=True, slots=True)
class Sample:
    """One video of a shard with its texts. `video` holds the encoded bytes, or a local path if they are large or the file is local."""

    key: str
    index: int  # position in the shard, rejected samples included; unique in an attempt
    uri: str  # of the object that holds it
    video: bytes | str
    video_ext: str
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    file_name: str = ""  # path in the tar, or base name of a plain file
    # About its texts, e.g. "caption_encoding:cp1252". Written to the row together with those of `VideoInfo`.
    warnings: tuple[str, ...] = ()
    # First byte and size of the video in its object; None if the object is compressed or the member is sparse.
    span: tuple[int, int] | None = field(default=None, compare=False)
    # Position in its object, if that is not `index`: it does not depend on how plain files are grouped.
    source_index: int | None = field(default=None, compare=False)

    @property
    def encoded_video(self) -> EncodedVideo:
        """The part that is sent to a decoder."""
        return EncodedVideo(self.key, self.uri, self.video, self.span)

    def __repr__(self) -> str:
        size = f"{len(self.video)} bytes" if isinstance(self.video, bytes) else self.video
        return f"Sample({self.key!r}, index={self.index}, video={size} .{self.video_ext})"


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample or clip that was not encoded, with the reason. `clip` is None if the whole sample is rejected."""

    key: str | None  # None: damage that belongs to no known sample (a truncated tar)
    stage: str  # read | decode | clips | encode
    reason: str  # stable slug
    message: str
    policy: bool  # True: excluded by the job's rules; False: damage, counts against the reject budget
    uri: str | None = None
    clip: int | None = None
    frames_recovered: int = 0
    clips_lost: int = 0  # clips that failed with the sample and have no reject of their own

    def __post_init__(self) -> None:
        if not self.stage or not self.reason or min(self.clip or 0, self.frames_recovered, self.clips_lost) < 0:
            raise ValueError(f"Reject wants a stage, a reason and counts of at least 0, got {self}")

    @classmethod
    def from_error(
        cls,
        error: BadDataError,
        sample: Sample | EncodedVideo,
        stage: str,
        *,
        clip: int | None = None,
        frames_recovered: int = 0,
    ) -> Reject:
        """The reject of `sample`, or of its clip number `clip`, because of `error`. `stage` is used if the error names none."""
        stage, policy = error.stage or stage, isinstance(error, PolicyReject)
        return cls(sample.key, stage, error.reason, error.message, policy, sample.uri, clip, frames_recovered)

    @property
    def clips(self) -> int:
        """Number of clips that this reject covers."""
        return self.clips_lost + (self.clip is not None)


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

    def __post_init__(self) -> None:
        sizes = (self.width, self.height, self.coded_width, self.coded_height, self.num_frames, *self.sample_aspect)
        if min(sizes) < 1 or self.rotation not in (0, 90, 180, 270) or not (self.fps >= 0 and self.duration_s >= 0):
            raise ValueError(
                f"VideoInfo wants sizes, frames and sample aspect of at least 1, a rotation of 0, 90, 180 or 270 degrees, and fps and "
                f"duration of at least 0, got {self}"
            )


def warning_kinds(sample: Sample, warnings: Iterable[str]) -> set[str]:
    """Kinds of warning of an encoded sample, as counted in receipts: of its texts, its video (`warnings`), and `no_caption`."""
    kinds = {warning.partition(":")[0] for warning in (*warnings, *sample.warnings)}
    return kinds if sample.caption is not None else kinds | {"no_caption"}


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


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """One clip to cut: frames `[start, start + bucket.frames)` on the video's sampling grid, scaled to cover and centre-cropped."""

    index: int
    start: int
    bucket: Bucket  # frames 0: up to the end of the video, trimmed to a length that the network takes
    fps: float  # of the sampling grid
    start_s: float
    scaled_height: int  # after scale-to-cover, before the crop
    scaled_width: int
    crop_top: int
    crop_left: int

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

    def __post_init__(self) -> None:
        latent, logvar = self.latent_CTHW, self.logvar_CTHW
        if self.dtype not in LATENT_DTYPES:
            raise ValueError(f"LatentClip wants a dtype of {', '.join(LATENT_DTYPES)}, got {self.dtype!r}")
        wanted = LATENT_DTYPES[self.dtype]
        if latent.ndim != 4 or not latent.size or latent.dtype.str != wanted:
            raise ValueError(
                f"LatentClip of {self.dtype} wants a latent (C, t, h, w) of numpy {wanted}, got {latent.dtype.str} {latent.shape}"
            )
        if logvar is not None and (logvar.shape, logvar.dtype) != (latent.shape, latent.dtype):
            raise ValueError(
                f"LatentClip wants a log-variance like its latent, {latent.dtype.str} {latent.shape}, "
                f"got {logvar.dtype.str} {logvar.shape}"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.id) or self.num_frames < 1 or not math.isfinite(self.end_s):
            raise ValueError(
                f"LatentClip wants an id of letters, digits, _ and -, at least 1 frame and a finite end, "
                f"got {self.id!r}, {self.num_frames} frames, {self.end_s} s"
            )

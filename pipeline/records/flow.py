"""Inputs and frames: what flows from a listed object to a latent clip. Plain, frozen, picklable values that check themselves.

    SourceObject ─in─ Shard → Sample → OpenedVideo + FrameChunk* → LatentClip
    any stage ─ Reject ─→ Receipt         (nothing leaves silently)

Legend: T frames, H W pixels, C channels, t h w latent grid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

# What counts as a video by its name: plain files in a corpus, fields in a shard. A sample with several keeps the earliest listed here.
# All belong to `FORMATS` of `pipeline.video.decode.container`.
# Suffixes that more often mean something else (ogg, mod, avs) are left out.
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


def stable_hash(value: Any, digest_size: int = 16) -> str:
    """Hex BLAKE2b of the canonical JSON of `value`: the same on every machine, Python and run."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=digest_size).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Frames x height x width in pixels. `frames` is 0 where the clip is a whole video of any length."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames or 'n'}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object of the corpus as it was when it was listed. `etag` is the store's, or `mtime_ns-size` for a local file."""

    uri: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class RetriedSample:
    """A sample that is encoded again, and what earlier receipts counted of it that no longer counts."""

    uri: str
    key: str
    damaged: bool
    clips_rejected: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Samples of a finished shard that are encoded again because they were rejected.

    A retry completes one receipt, its base: it counts only beside that, and ids are made with the etags that the base knew.
    """

    base: str  # shard id
    base_attempt: str
    samples: tuple[RetriedSample, ...]  # sorted
    after: tuple[str, ...]  # shards of the earlier retries of this base that were known, sorted
    etags: tuple[tuple[str, str], ...] = ()  # (uri, etag) of objects that have another etag by now, and the same bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work: one tar, or a group of plain video files (`kind="files"`). With `retry`, some samples of them again."""

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
        """32 hex digits: what this shard's contents are and what would be made of them. Changed either way, it is a new shard."""
        parts = {"objects": [asdict(source) for source in self.objects], "fingerprint": fingerprint}
        return stable_hash(parts if self.retry is None else {**parts, "retry": asdict(self.retry)})


def retry_from_dict(raw: dict[str, Any]) -> Retry:
    """Inverse of `asdict` after a trip through JSON."""
    samples = tuple(RetriedSample(**sample) for sample in raw["samples"])
    etags = tuple((uri, etag) for uri, etag in raw["etags"])
    return Retry(raw["base"], raw["base_attempt"], samples, tuple(raw["after"]), etags)


def shard_from_dict(raw: dict[str, Any]) -> Shard:
    """Inverse of `asdict` after a trip through JSON. Raises KeyError or TypeError where `raw` is something else."""
    retry = raw.get("retry")
    return Shard(
        raw["kind"],
        raw["name"],
        tuple(SourceObject(**source) for source in raw["objects"]),
        retry and retry_from_dict(retry),
    )


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """What a decoder needs of a sample. Captions and metadata may be huge or nested too deeply to pickle: they stay with the owner."""

    key: str
    uri: str
    video: bytes | str  # as `Sample.video`
    span: tuple[int, int] | None = None  # as `Sample.span`

    def __repr__(self) -> str:
        size = f"{len(self.video)} bytes" if isinstance(self.video, bytes) else self.video
        return f"EncodedVideo({self.key!r}, video={size})"


@dataclass(frozen=True, slots=True)
class Sample:
    """One key of a shard. `video` is the encoded file's bytes, or a local path when it was too large to hold (or never was remote)."""

    key: str
    index: int  # position in the shard, counting every sample, rejected ones too; unique in an attempt
    uri: str  # the object it came from
    video: bytes | str
    video_ext: str
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    file_name: str = ""  # as in the object: the path in a tar, the base name of a plain file
    # Of its texts, e.g. "caption_encoding:cp1252"; they become the row's, like those of `VideoInfo`.
    warnings: tuple[str, ...] = ()
    # First byte and size of the video in its object, where that holds it as it is (no compression, no holes).
    span: tuple[int, int] | None = field(default=None, compare=False)
    # Position in its object where that is not `index`: the same however plain files are grouped.
    source_index: int | None = field(default=None, compare=False)

    @property
    def encoded_video(self) -> EncodedVideo:
        """What a decoder is given of it."""
        return EncodedVideo(self.key, self.uri, self.video, self.span)

    def __repr__(self) -> str:
        size = f"{len(self.video)} bytes" if isinstance(self.video, bytes) else self.video
        return f"Sample({self.key!r}, index={self.index}, video={size} .{self.video_ext})"


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that was not encoded (or not all of it), with the reason. `clip` is None when the whole sample is meant."""

    key: str | None  # None: the damage cannot be tied to a sample (a truncated tar)
    stage: str  # read | decode | clips | encode
    reason: str  # stable slug
    message: str
    policy: bool  # True: the job's rules exclude it; False: damage, counts against the reject budget
    uri: str | None = None
    clip: int | None = None
    frames_recovered: int = 0
    clips_lost: int = 0  # clips that failed with the sample and have no reject of their own

    @property
    def clips(self) -> int:
        """Clips that this reject stands for."""
        return self.clips_lost + (self.clip is not None)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is, as shown: sizes after rotation and sample aspect ratio, times in seconds from the first shown frame."""

    codec: str
    pixel_format: str
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int  # degrees clockwise applied to show it: 0, 90, 180, 270
    sample_aspect: tuple[int, int]
    fps: float  # average over the shown frames
    num_frames: int
    duration_s: float
    color_matrix: str  # "bt601" | "bt709" | "bt2020nc": what is used to make RGB
    color_range: str  # as tagged: "limited" | "full" | "untagged"
    content_hash: str  # BLAKE2b-128 of the encoded bytes, hex
    warnings: tuple[str, ...] = ()  # decisions taken on the way, e.g. "untagged_color:bt709", "deinterlaced"


def warning_kinds(sample: Sample, warnings: Iterable[str]) -> set[str]:
    """What is counted of an encoded sample: kinds of its warnings and its video's, and `no_caption`."""
    kinds = {warning.partition(":")[0] for warning in (*warnings, *sample.warnings)}
    return kinds if sample.caption is not None else kinds | {"no_caption"}


@dataclass(frozen=True, slots=True)
class ClipRules:
    """The job's clip section resolved against the network: what `clips.plan` needs, and nothing of where it came from."""

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
    bucket: Bucket  # frames 0: to the end of the video, trimmed to the network's rule
    fps: float  # of the sampling grid
    start_s: float
    scaled_height: int  # after scale-to-cover, before the crop
    scaled_width: int
    crop_top: int
    crop_left: int


@dataclass(frozen=True, slots=True)
class OpenedVideo:
    """Answer of a decoder to `open`: what the video is, which clips will come, what was refused."""

    info: VideoInfo
    clips: tuple[ClipPlan, ...]
    rejects: tuple[Reject, ...]


ChunkShape = tuple[bool, int, int, int]
"""First chunk of its clip or not, frames, height, width: what chunks must share to be stacked."""


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """The next frames of a clip: uint8 YUV 4:4:4 planes, limited range, at bucket size.

    The first chunk of a clip has 4n+1 frames, later ones 4n (4 and 1 are the network's time stride and lead frames).
    """

    clip: int
    planes_T3HW: np.ndarray  # uint8, C-contiguous, rows Y, U, V
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
        """What chunks must share to be stacked."""
        frames, _, height, width = self.planes_T3HW.shape
        return self.first, frames, height, width

    @property
    def nbytes(self) -> int:
        """Bytes held by the planes."""
        return int(self.planes_T3HW.nbytes)


@dataclass(frozen=True, slots=True)
class ClipFailed:
    """A clip that was promised and cannot be finished (the stream broke under it). Carries the reject to record."""

    clip: int
    reject: Reject


@dataclass(frozen=True, slots=True)
class VideoEnded:
    """No more chunks. `frames_decoded` counts frames that left the codec; `decode_s` is the worker's time on this video."""

    frames_decoded: int
    decode_s: float


@dataclass(frozen=True, slots=True)
class LatentClip:
    """A finished clip. Tensors are raw (unscaled), little-endian, C order `CTHW`, already in the storage dtype.

    bfloat16 has no numpy type: it travels as uint16 holding the bits, `dtype` says which it is. Arrays may be memory-mapped.
    """

    id: str  # [A-Za-z0-9_-], unique in the output
    sample: Sample
    info: VideoInfo
    plan: ClipPlan
    num_frames: int
    end_s: float
    latent_CTHW: np.ndarray
    logvar_CTHW: np.ndarray | None
    dtype: str  # float16 | bfloat16 | float32

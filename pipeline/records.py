"""What flows through the pipeline: plain, frozen, picklable values that check themselves. No torch, no I/O.

    SourceObject ─in─ Shard → Sample → OpenedVideo + FrameChunk* → LatentClip → WrittenFile → Receipt
    any stage ─ Reject ─→ Receipt         (nothing leaves silently)

Legend: T frames, H W pixels, C channels, t h w latent grid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1

# What counts as a video by its name: plain files in a corpus, fields in a shard. A sample with several keeps the earliest listed here.
VIDEO_EXTENSIONS = (
    *(
        "mp4",
        "mkv",
        "webm",
        "mov",
        "avi",
        "m4v",
        "mpg",
        "mpeg",
        "ts",
        "m2ts",
        "mts",
        "wmv",
        "flv",
        "ogv",
        "3gp",
        "3g2",
        "vob",
        "mxf",
    ),
    *("h264", "264", "h265", "265", "hevc", "ivf", "obu", "y4m"),
)


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
class Retry:
    """Which samples of sources that have a receipt are encoded again because they were rejected before.

    `after`: attempts of the receipts that were known when the retry was planned; their rows are not written again.
    """

    samples: tuple[tuple[str, str], ...]  # (uri of the source, key of the sample), sorted
    after: tuple[str, ...]  # sorted
    damaged: int = 0  # of `samples`, those that were counted as damaged
    clips_rejected: int = 0  # clips of `samples` that were counted as rejected


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
    samples = tuple((uri, key) for uri, key in raw["samples"])
    return Retry(samples, tuple(raw["after"]), raw["damaged"], raw["clips_rejected"])


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
class Sample:
    """One key of a shard. `video` is the encoded file's bytes, or a local path when it was too large to hold (or never was remote)."""

    key: str
    index: int  # position in the shard, counting every sample, rejected ones too; unique in an attempt
    uri: str  # the object it came from
    video: bytes | str
    video_ext: str
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    # First byte and size of the video in its object, where that holds it as it is (no compression, no holes).
    span: tuple[int, int] | None = field(default=None, compare=False)
    # Position in its object where that is not `index`: the same however plain files are grouped.
    source_index: int | None = field(default=None, compare=False)

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


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file and its side index, under attempt-unique keys relative to the output."""

    key: str
    index_key: str
    bucket: str
    num_bytes: int
    index_bytes: int
    rows: int
    sha256: str
    index_sha256: str
    frames: int = 0  # pixel frames over all rows: what the bucket alone does not tell where clips are whole videos


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Per-channel running statistics of stored latents, mergeable (Chan et al.). Lists have one entry a channel."""

    n: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ChannelStats:
        """Inverse of `asdict` after a trip through JSON, where tuples become lists."""
        return cls(raw["n"], *(tuple(raw[name]) for name in ("mean", "m2", "min", "max")))

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Statistics of both sets together."""
        if self.n == 0:
            return other
        if other.n == 0:
            return self
        n = self.n + other.n
        delta = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        return ChannelStats(
            n=n,
            mean=tuple(a + d * other.n / n for a, d in zip(self.mean, delta, strict=True)),
            m2=tuple(a + b + d * d * self.n * other.n / n for a, b, d in zip(self.m2, other.m2, delta, strict=True)),
            min=tuple(map(min, self.min, other.min)),
            max=tuple(map(max, self.max, other.max)),
        )


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a shard attempt's time went, in seconds. The first three are of the encode loop's thread and do not overlap; writing and
    decoding go on beside it.
    """

    fetch_s: float = 0.0  # waiting for storage
    decode_wait_s: float = 0.0  # waiting for frames
    encode_s: float = 0.0  # in the network
    write_s: float = 0.0  # building, hashing and storing files, in the attempt's own thread
    total_s: float = 0.0
    decode_cpu_s: float = 0.0  # spent inside decoders, overlaps the rest

    def __add__(self, other: Timings) -> Timings:
        return Timings(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Counts:
    """What went in and what came out. `samples = encoded + rejected`, `clips_planned = clips + clips_rejected`."""

    samples: int = 0
    encoded: int = 0  # samples with at least one clip written
    rejected: int = 0
    clips_planned: int = 0
    clips: int = 0
    clips_rejected: int = 0
    frames: int = 0  # pixel frames in written clips
    damaged: int = 0  # rejects that are not policy; what the reject budget looks at

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def check(self) -> None:
        """Raises ValueError if the books do not balance."""
        if self.samples != self.encoded + self.rejected or self.clips_planned != self.clips + self.clips_rejected:
            raise ValueError(f"counts do not reconcile: {self}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """The object that says a shard is done and names its files: the only truth readers trust."""

    format_version: int
    shard_id: str
    shard: Shard
    fingerprint: str
    fingerprint_parts: dict[str, Any]
    attempt: str
    created: str  # UTC, ISO 8601
    files: tuple[WrittenFile, ...]
    counts: Counts
    rejects: tuple[Reject, ...]
    stats: ChannelStats | None
    timings: Timings
    notes: dict[str, Any] = field(default_factory=dict)  # device, host-independent environment, reader counters
    # Options that reject inputs and are not part of the fingerprint, as they were: a later run may have others.
    limits: dict[str, float] = field(default_factory=dict)
    # By URI, the BLAKE2b-128 in hex of the object's bytes, where they were read as a whole.
    digests: dict[str, str] = field(default_factory=dict)
    # By URI, the shard of an older version of the object that has the same bytes. Nothing of such a receipt was encoded.
    same_as: dict[str, str] = field(default_factory=dict)
    recovered: int = 0  # of a retry: samples that have clips now and had none

    def added(self) -> Counts:
        """What this receipt adds to the counts of an output. A retry replaces what an earlier receipt says of the same samples."""
        counts, retry = self.counts, self.shard.retry
        if retry is None:
            return counts
        return Counts(
            samples=0,
            encoded=self.recovered,
            rejected=-self.recovered,
            clips_planned=counts.clips_planned - retry.clips_rejected,
            clips=counts.clips,
            clips_rejected=counts.clips_rejected - retry.clips_rejected,
            frames=counts.frames,
            damaged=counts.damaged - retry.damaged,
        )

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """Inverse of `to_json`.

        Raises:
            ValueError: not a receipt, or of another format version.
        """
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            got = raw.get("format_version") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"receipt has format version {got!r}, this Lathe reads {FORMAT_VERSION}")
        shard = raw["shard"]
        stats = raw["stats"]
        return cls(
            **{
                **raw,
                "shard": shard_from_dict(shard),
                "files": tuple(WrittenFile(**item) for item in raw["files"]),
                "counts": Counts(**raw["counts"]),
                "rejects": tuple(Reject(**item) for item in raw["rejects"]),
                "stats": None if stats is None else ChannelStats.from_dict(stats),
                "timings": Timings(**raw["timings"]),
            }
        )

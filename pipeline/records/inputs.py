"""Records of inputs: listed objects, shards, samples, and rejects of those that are not encoded. Frozen, picklable values."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import PolicyReject
from pipeline.records.members import MemberObject, MemberVideo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.errors import BadDataError
    from pipeline.records.video_counts import VideoCounts

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

# Suffixes of files that are read as images if `images.policy` says so. In order of preference, as above. Their contents decide: a
# picture that moves is a video, and so is a video of this name.
IMAGE_EXTENSIONS = ("png", "webp", "avif", "tif", "tiff", "bmp", "jpg", "jpeg", "jpe", "jfif")

MAYBE_STILL = frozenset(("gif", "apng"))
"""Of the suffixes of videos those of files that may hold a single picture."""

# Stem of `a.short.txt`: the video's, and the caption's name. Other names are those of subtitles, notes, recognised text.
NAMED_CAPTION = re.compile(
    r"(.+)\.((?:caption|prompt|short|long|brief|dense|detailed)(?:[_-]?[0-9]+|[_-][a-z0-9_-]+)?)",
    re.DOTALL | re.IGNORECASE,
)

ImagePolicy = Literal["keep", "skip", "only"]
"""Images beside videos, videos alone, images alone."""


def named_caption(stem: str) -> tuple[str, str] | None:
    """`("a", "short")` for the stem `a.short` of a text `a.short.txt`: the video's stem and the caption's name. None for other stems, and
    for `a.caption`, which is the caption itself.
    """
    found = NAMED_CAPTION.fullmatch(stem)
    return None if found is None or found[2].lower() == "caption" else (found[1], found[2])


def stable_hash(value: Any, digest_size: int = 16) -> str:
    """Hex BLAKE2b of the canonical JSON of `value`. It is the same on every machine, Python version and run."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=digest_size).hexdigest()


MISSING = "missing"
"""Etag of an object that a table names and the store does not have: its reject is recorded as for any other input."""


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object of the corpus, as it was listed. `size` in bytes; `etag` is the store's, or `mtime_ns-size` for a local file."""

    uri: str
    size: int
    etag: str
    # Digest of what decides its rows and is not in it: rows of tables, spans beside a plain file (ADR 23). Empty: nothing.
    annotations: str = ""
    members: tuple[MemberObject, ...] = ()  # paired videos; what decides rows of them is in `annotations`

    @property
    def version(self) -> str:
        """Etag and annotations."""
        return f"{self.etag}+{self.annotations}" if self.annotations else self.etag

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
    # Rows of tables about these objects, see `corpus.annotations`. Only where a shard is on its way to a reader: receipts have digests.
    rows: bytes = field(default=b"", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.objects or (self.kind == "tar" and len(self.objects) != 1):
            raise ValueError(f"shard {self.name!r} of kind {self.kind!r} has {len(self.objects)} objects")

    @property
    def num_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(source.size for source in self.objects)

    def id(self, fingerprint: str) -> str:
        """32 hex digits. They change if an object, its annotations, the job's fingerprint or the retried samples change."""
        # Not by `asdict`, which takes four times as long: a driver starts with the ids of all its shards.
        objects = [
            {"uri": source.uri, "size": source.size, "etag": source.etag}
            | ({"annotations": source.annotations} if source.annotations else {})
            for source in self.objects
        ]
        parts = {"objects": objects, "fingerprint": fingerprint}
        return stable_hash(parts if self.retry is None else {**parts, "retry": asdict(self.retry)})


def stored_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """`asdict` of a shard as receipts have it: without `rows`, and without `annotations` and `members` of objects that have none."""
    kept = [name for name in raw if name != "rows"]
    objects = [
        {name: value for name, value in source.items() if value or name not in ("annotations", "members")}
        for source in raw["objects"]
    ]
    return {**{name: raw[name] for name in kept}, "objects": objects}


def retry_from_dict(raw: dict[str, Any]) -> Retry:
    """Inverse of `asdict`, from values read back from JSON."""
    samples = tuple(RetriedSample(**sample) for sample in raw["samples"])
    etags = tuple((uri, etag) for uri, etag in raw["etags"])
    return Retry(raw["base"], raw["base_attempt"], samples, tuple(raw["after"]), etags)


def shard_from_dict(raw: dict[str, Any]) -> Shard:
    """Inverse of `stored_shard`, from values read back from JSON. Raises KeyError, TypeError or ValueError if `raw` is not a shard."""
    retry = raw.get("retry")
    return Shard(
        raw["kind"],
        raw["name"],
        tuple(
            SourceObject(**{**source, "members": tuple(MemberObject(**member) for member in source.get("members", ()))})
            for source in raw["objects"]
        ),
        retry and retry_from_dict(retry),
    )


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A part of a video as annotated: `[start, end)` in seconds from the first shown frame, or in shown frames."""

    start: float
    end: float
    unit: Literal["seconds", "frames"] = "seconds"
    fault: str = ""  # why the annotation cannot be used; `start` and `end` are 0 then


@dataclass(frozen=True, slots=True)
class SpanTexts:
    """Texts of an annotated span, for the rows of its clips."""

    captions: tuple[tuple[str, str], ...] = ()  # (name, text); none: those of the sample
    fields: dict[str, Any] = field(default_factory=dict)  # added to the sample's metadata


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """The part of a sample that is sent to a decoder. Captions and metadata are not: they may be huge, or too deeply nested to pickle."""

    key: str
    uri: str
    video: bytes | str  # as `Sample.video`
    span: tuple[int, int] | None = None  # as `Sample.span`
    extension: str = ""  # as `Sample.video_ext`
    time_spans: tuple[TimeSpan, ...] = ()  # as `Sample.time_spans`
    members: tuple[MemberVideo, ...] = ()  # as `Sample.members`

    def __repr__(self) -> str:
        size = f"{len(self.video)} bytes" if isinstance(self.video, bytes) else self.video
        return f"EncodedVideo({self.key!r}, video={size})"


@dataclass(frozen=True, slots=True)
class Sample:
    """One video or image of a shard with its texts. `video` holds the encoded bytes, or a local path if they are large or the file is
    local.
    """

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
    time_spans: tuple[TimeSpan, ...] = ()  # where clips are cut, for rules with spans; in the order of their annotation
    span_texts: tuple[SpanTexts, ...] = ()  # of each of them
    captions: tuple[tuple[str, str], ...] = ()  # (name, text) of all captions; `caption` is the first
    members: tuple[MemberVideo, ...] = ()  # paired videos, in the order of their names

    @property
    def named_captions(self) -> tuple[tuple[str, str], ...]:
        """(name, text) of all different captions, `caption` first."""
        if self.caption is None or (self.captions and self.captions[0][1] == self.caption):
            return self.captions
        return (("caption", self.caption), *(item for item in self.captions if item[1] != self.caption))

    @property
    def encoded_video(self) -> EncodedVideo:
        """The part that is sent to a decoder."""
        return EncodedVideo(self.key, self.uri, self.video, self.span, self.video_ext, self.time_spans, self.members)

    def texts_of(self, span: int | None) -> Sample:
        """The sample as a row of a clip needs it: without its video, with the texts of the annotated span a clip was cut from. `span`
        is None for an image, which has the texts of its span if there is one alone.
        """
        bare = replace(self, video=b"", time_spans=(), span_texts=(), members=())
        if span is None and len(self.span_texts) != 1:
            return bare
        texts = self.span_texts[span or 0]
        bare = replace(bare, metadata={**self.metadata, **texts.fields})
        return replace(bare, caption=texts.captions[0][1], captions=texts.captions) if texts.captions else bare

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
    # Length and size of the video, as far as known: on one reject of a sample that has no clips, and nowhere else.
    video: VideoCounts = field(default_factory=dict)
    # Of the clips that it covers, by bucket. A video that the clip rules refuse as a whole: the bucket it was nearest to, once.
    buckets: dict[str, int] = field(default_factory=dict)

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
        return cls(
            sample.key,
            stage,
            error.reason,
            error.message,
            policy,
            sample.uri,
            clip,
            frames_recovered,
            video=error.video,
        )

    @property
    def clips(self) -> int:
        """Number of clips that this reject covers."""
        return self.clips_lost + (self.clip is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without `video` and `buckets` where they are empty."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("video", "buckets")}


def warning_kinds(sample: Sample, warnings: Iterable[str]) -> set[str]:
    """Kinds of warning of an encoded sample, as counted in receipts: of its texts, its video (`warnings`), and `no_caption`."""
    kinds = {warning.partition(":")[0] for warning in (*warnings, *sample.warnings)}
    captionless = sample.caption is None and not (
        sample.span_texts and all(texts.captions for texts in sample.span_texts)
    )
    return kinds | {"no_caption"} if captionless else kinds

"""Records that flow between packages: frozen, picklable values, which check themselves if they reach disk. No torch, no I/O.

    Shard of SourceObjects → Sample → OpenedVideo, FrameChunks → LatentClip
    any stage → Reject → Receipt          (every input that is not encoded gets a Reject)

- `inputs`: listed objects, shards, samples, rejects
- `members`: paired videos of a sample
- `annotation_rows`: rows of tables on their way to the reader of a shard
- `clips`: an opened video, its clips, frames and latents
- `receipt`: files, counts and the receipt of a shard
- `video_counts`: source videos counted by length and size
"""

from pipeline.records.clips import (
    BASE,
    FLIP,
    LATENT_DTYPES,
    Bucket,
    ChunkShape,
    ClipFailed,
    ClipPlan,
    ClipRules,
    FrameChunk,
    ImageRules,
    LatentClip,
    OpenedVideo,
    StillOpening,
    VideoEnded,
    VideoInfo,
    is_mirrored,
    split_id,
    variant_names,
)
from pipeline.records.inputs import (
    IMAGE_EXTENSIONS,
    MAYBE_STILL,
    MISSING,
    VIDEO_EXTENSIONS,
    EncodedVideo,
    ImagePolicy,
    Reject,
    RetriedSample,
    Retry,
    Sample,
    Shard,
    SourceObject,
    SpanTexts,
    TimeSpan,
    named_caption,
    retry_from_dict,
    shard_from_dict,
    stable_hash,
    stored_shard,
    warning_kinds,
)
from pipeline.records.members import MAIN, MemberObject, MemberRule, MemberVideo, is_mask
from pipeline.records.receipt import FORMAT_VERSIONS, ChannelStats, Counts, Receipt, Timings, WrittenFile
from pipeline.records.video_counts import VideoCounts, video_counts

__all__ = [
    "BASE",
    "FLIP",
    "FORMAT_VERSIONS",
    "IMAGE_EXTENSIONS",
    "LATENT_DTYPES",
    "MAIN",
    "MAYBE_STILL",
    "MISSING",
    "VIDEO_EXTENSIONS",
    "Bucket",
    "ChannelStats",
    "ChunkShape",
    "ClipFailed",
    "ClipPlan",
    "ClipRules",
    "Counts",
    "EncodedVideo",
    "FrameChunk",
    "ImagePolicy",
    "ImageRules",
    "LatentClip",
    "MemberObject",
    "MemberRule",
    "MemberVideo",
    "OpenedVideo",
    "Receipt",
    "Reject",
    "RetriedSample",
    "Retry",
    "Sample",
    "Shard",
    "SourceObject",
    "SpanTexts",
    "StillOpening",
    "TimeSpan",
    "Timings",
    "VideoCounts",
    "VideoEnded",
    "VideoInfo",
    "WrittenFile",
    "is_mask",
    "is_mirrored",
    "named_caption",
    "retry_from_dict",
    "shard_from_dict",
    "split_id",
    "stable_hash",
    "stored_shard",
    "variant_names",
    "video_counts",
    "warning_kinds",
]

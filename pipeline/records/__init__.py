"""Records that flow between packages: plain, frozen, picklable values. No torch, no I/O.

- `flow`: from a listed object to a latent clip
- `receipt`: files, counts and the receipt of a shard
"""

from pipeline.records.flow import (
    VIDEO_EXTENSIONS,
    Bucket,
    ChunkShape,
    ClipFailed,
    ClipPlan,
    ClipRules,
    EncodedVideo,
    FrameChunk,
    LatentClip,
    OpenedVideo,
    Reject,
    RetriedSample,
    Retry,
    Sample,
    Shard,
    SourceObject,
    VideoEnded,
    VideoInfo,
    retry_from_dict,
    shard_from_dict,
    stable_hash,
    warning_kinds,
)
from pipeline.records.receipt import FORMAT_VERSIONS, ChannelStats, Counts, Receipt, Timings, WrittenFile

__all__ = [
    "FORMAT_VERSIONS",
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
    "LatentClip",
    "OpenedVideo",
    "Receipt",
    "Reject",
    "RetriedSample",
    "Retry",
    "Sample",
    "Shard",
    "SourceObject",
    "Timings",
    "VideoEnded",
    "VideoInfo",
    "WrittenFile",
    "retry_from_dict",
    "shard_from_dict",
    "stable_hash",
    "warning_kinds",
]

"""Values of the report of one snapshot: frozen records, JSON-ready by `Report.to_dict`. The page and `report.json` have the same ones.

Times are UTC, ISO 8601. Seconds, bytes, pixels, frames and decibels are plain numbers. `None`: not known; a notice says why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Network:
    """One fingerprint of the snapshot: the network, its weights, and what it holds."""

    fingerprint: str
    name: str
    weights: str | None  # place that the data files record
    weights_sha256: str | None
    untrained: bool
    latent: dict[str, Any]  # posterior, dtype, layout, byte_order
    rows: int
    frames: int
    bytes: int
    spec: dict[str, Any]  # channels, strides; see docs/formats.md
    parts: dict[str, Any]  # fingerprint_parts: everything that can change a latent


@dataclass(frozen=True, slots=True)
class Build:
    """One build between the parent and this snapshot, from its run log. `frames_per_s`: written, after the start-up."""

    build: str
    started: str | None
    ended: str | None
    outcome: str | None  # None: its log has no end
    wall_s: float | None = None
    frames: int | None = None
    frames_per_s: float | None = None
    encoders: int | None = None
    encoder_s: float | None = None  # seconds that encoders were up, summed
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What encoding took, over all receipts of the snapshot. An estimate if only some of them were read."""

    core_s: float  # CPU time of decoders, and of networks on CPUs
    gpu_s: float  # time in networks on GPUs
    receipts: int
    receipts_read: int
    first_commit: str | None
    last_commit: str | None


@dataclass(frozen=True, slots=True)
class Example:
    """One rejected sample or clip. `key`: None for damage that belongs to no sample."""

    uri: str | None
    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class RejectReason:
    """Inputs that were left out for one reason. `count`: exact; `stages`, `examples`: of the receipts that were read."""

    reason: str
    count: int
    share: float  # of all samples
    policy: bool | None  # True: the job's rules exclude them; False: damaged
    stages: tuple[str, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class LostSource:
    """A source object with many rejects."""

    uri: str
    rejects: int
    samples: int | None  # in its shard


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by value. `labels` ascend; each list of `series` has one count for each label."""

    name: str
    unit: str
    labels: tuple[str, ...]
    series: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class SourceVideos:
    """Source videos whose length and size are recorded. `encoded_s`, `rejected_s`: their lengths, summed."""

    encoded: int
    rejected: int  # of which one of both was known when they were rejected
    encoded_s: float
    rejected_s: float
    histograms: tuple[Histogram, ...]  # length, size: all inputs against encoded ones


@dataclass(frozen=True, slots=True)
class BucketLoss:
    """What a bucket lost. `share`: of its rows, lost clips and refused videos, a video counted once."""

    bucket: str
    rows: int
    lost: int  # clips that failed
    refused: int  # videos that the clip rules refuse, and that were nearest to this bucket
    share: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is not in the snapshot, and why."""

    samples: int
    encoded: int
    rejected: int
    damaged: int
    clips_rejected: int
    reasons: tuple[RejectReason, ...]  # most frequent first
    sources: tuple[LostSource, ...]  # most rejects first
    losses: tuple[BucketLoss, ...]  # largest share first; of receipts that record them
    videos: SourceVideos | None  # None: not recorded, by earlier versions of Lathe
    buckets: dict[str, int]  # rows that a bucket has fewer than in the parent
    without_caption: int  # encoded samples; of receipts whose rows all count
    warnings: dict[str, int]
    open_shards: int
    takedowns: int
    newer_takedowns: int  # since the snapshot; readers apply them, the numbers of this report do not
    receipts: int
    receipts_read: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the snapshot, all or evenly spread over its files. `cells`: one list for each row, in the order of `columns`."""

    total: int
    columns: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]
    sampled: bool
    files_read: int
    files: int
    without_caption: int  # of `cells`
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True, slots=True)
class Channels:
    """Values of stored latents of one fingerprint, by channel. `exact`: mean, std, min, max over all rows; histograms of a sample."""

    fingerprint: str
    network: str
    exact: dict[str, Any]
    parent: dict[str, Any] | None  # as `exact`
    constants: dict[str, Any]  # scale, shift, mean, std of the network's authors; null where it has none
    normalised: dict[str, float] | None  # mean and std over all channels after normalising by `constants`
    clips: int  # of the sample
    edges: tuple[tuple[float, ...], ...]
    histograms: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip that was decoded. PSNR in dB with peak 255, SSIM in [-1, 1], both by frame; empty without original."""

    id: str
    key: str
    source: str
    bucket: str
    variant: str
    frames: int
    fps: float
    caption: str | None
    psnr: float | None
    ssim: float | None
    frame_psnr: tuple[float, ...]
    frame_ssim: tuple[float, ...]
    shown: str | None  # worst, median, best, random; None: measured only
    pictures: dict[str, str] = field(
        default_factory=dict
    )  # names of pictures by kind: still, original, decoded, channels


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding a few clips gave. `clips` are ordered by PSNR, lowest first."""

    network: dict[str, Any] | None
    clips: tuple[Clip, ...]
    without_original: int
    lead_positions: int  # latent positions of the first frame
    positions: tuple[float, ...]  # mean SSIM by latent position, over the clips that have it
    channel_std: dict[str, tuple[float, ...]]  # of the clip whose channels are shown: first, other positions
    channels_of: str | None  # id of that clip


@dataclass(frozen=True, slots=True)
class Changes:
    """Differences to the parent, from the record, and to another snapshot if one was asked for."""

    parent: int | None
    counts: dict[str, int]
    against: dict[str, Any] | None  # as `lathe diff --json`, lists of names cut
    lineage: dict[str, Any]
    ancestors: tuple[dict[str, Any], ...]  # number, created, rows, bytes; newest first


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a report says of one snapshot."""

    output: str
    name: str
    snapshot: int
    created: str
    made: str  # when the report was
    lathe: str
    counts: dict[str, int]
    seconds: float | None  # of video in all clips
    seconds_exact: bool  # False: from the frame rates of a sample
    buckets: dict[str, dict[str, int]]
    networks: tuple[Network, ...]
    checks: tuple[dict[str, Any], ...]
    builds: tuple[Build, ...]
    cost: Cost
    left_out: LeftOut
    rows: Rows
    channels: tuple[Channels, ...]
    decoded: Decoded
    changes: Changes
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"format": "lathe-report", "format_version": FORMAT_VERSION, **asdict(self)}

"""Records of results: written files, counts, statistics and the receipt of a shard. Frozen, picklable values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic_core import from_json

from pipeline.records.inputs import Reject, Shard, shard_from_dict, stored_shard
from pipeline.records.video_counts import VideoCounts

FORMAT_VERSIONS = (1, 2)
"""Format versions of outputs. A receipt has that of its output; versions differ in the names of objects, see `format.layout`."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file and its side index. Keys are relative to the output and used by one attempt only; hashes are hex."""

    key: str
    index_key: str
    bucket: str
    num_bytes: int
    index_bytes: int
    rows: int
    sha256: str
    index_sha256: str
    frames: int = 0  # video frames of all rows; needed because buckets of whole videos name no length
    ranges: dict[str, list[Any]] = field(default_factory=dict)
    """Least and greatest value of `id`, `fps` and `num_frames` over all rows, and with `unpaired: encode` whether they have each member,
    true or false. Empty in receipts of version 1."""

    def __post_init__(self) -> None:
        if not self.key or not self.index_key or min(self.num_bytes, self.index_bytes, self.rows, self.frames) < 0:
            raise ValueError(f"WrittenFile wants two keys and sizes and counts of at least 0, got {self}")


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Running statistics of stored latents, one entry per channel. They can be merged (Chan et al.)."""

    n: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.n < 0 or len({len(self.mean), len(self.m2), len(self.min), len(self.max)}) > 1:
            raise ValueError(f"ChannelStats wants n of at least 0 and four lists of one length, got {self}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ChannelStats:
        """Inverse of `asdict`, from values read back from JSON."""
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
    """Seconds that a shard attempt spent. The first three are of the encode loop's thread and do not overlap."""

    fetch_s: float = 0.0  # waiting for storage
    decode_wait_s: float = 0.0  # waiting for frames
    encode_s: float = 0.0  # in the network
    write_s: float = 0.0  # building, hashing and storing files, in the attempt's own thread
    total_s: float = 0.0
    decode_cpu_s: float = 0.0  # CPU time of decoders; overlaps the rest

    def __add__(self, other: Timings) -> Timings:
        return Timings(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples and clips of a shard. `samples = encoded + rejected`, `clips_planned = clips + clips_rejected`."""

    samples: int = 0
    encoded: int = 0  # samples with at least one clip written
    rejected: int = 0
    clips_planned: int = 0
    clips: int = 0
    clips_rejected: int = 0
    frames: int = 0  # video frames of written clips
    damaged: int = 0  # damaged samples and regions, for the reject budget
    damaged_regions: int = (
        0  # damage of a tar that belongs to no sample (truncated end, broken header); part of `damaged`
    )

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def check(self) -> None:
        """Raises ValueError if one of the two sums is wrong."""
        if self.samples != self.encoded + self.rejected or self.clips_planned != self.clips + self.clips_rejected:
            raise ValueError(
                f"counts do not reconcile: expected samples = encoded + rejected, clips_planned = clips + clips_rejected; got {self}"
            )


def _parsed(data: bytes) -> Any:
    """As `json.loads`, in less than half the time: a resume may parse 100,000 receipts."""
    try:
        return from_json(data)
    except ValueError:  # also of lone surrogates, which stand for bytes of file names that are not UTF-8
        return json.loads(data)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record that a shard is done. It names the shard's files; files that no receipt names do not count."""

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
    # Options that reject inputs and are not part of the fingerprint, with their values in this build.
    limits: dict[str, float] = field(default_factory=dict)
    # URI -> BLAKE2b-128 in hex of the object's bytes, for objects that were read whole.
    digests: dict[str, str] = field(default_factory=dict)
    # URI -> shard id of an older version of the object with the same bytes. Such a receipt has no rows of its own.
    same_as: dict[str, str] = field(default_factory=dict)
    empty: tuple[str, ...] = ()  # URIs of plain files that gave no clip
    # Counters of the reader, and encoded samples by kind of row warning or `no_caption`. A retry counts only samples that no earlier
    # receipt counts.
    warnings: dict[str, int] = field(default_factory=dict)
    recovered: tuple[
        tuple[str, str], ...
    ] = ()  # of a retry: (uri, key) of samples that had no clips before and have some now
    # Encoded samples by length and size of their videos, one entry for each object of the shard. A retry counts only samples that no
    # earlier receipt holds. None: not recorded.
    videos: tuple[VideoCounts, ...] | None = None

    def added(self) -> Counts:
        """What this receipt adds to the counts of an output. A retry replaces the earlier counts of its samples, so some are negative."""
        counts, retry = self.counts, self.shard.retry
        if retry is None:
            return counts
        return Counts(
            samples=0,
            encoded=len(self.recovered),
            rejected=-len(self.recovered),
            clips_planned=counts.clips_planned - sum(sample.clips_rejected for sample in retry.samples),
            clips=counts.clips,
            clips_rejected=counts.clips_rejected - sum(sample.clips_rejected for sample in retry.samples),
            frames=counts.frames,
            damaged=counts.damaged - sum(sample.damaged for sample in retry.samples),
            damaged_regions=counts.damaged_regions,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        raw = asdict(self)
        return {**raw, "shard": stored_shard(raw["shard"]), "rejects": [item.to_dict() for item in self.rejects]}

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """Inverse of `to_json`.

        Raises:
            ValueError: not a receipt, another format version, or a record that fails its check.
        """
        raw = _parsed(data)
        if not isinstance(raw, dict) or raw.get("format_version") not in FORMAT_VERSIONS:
            got = raw.get("format_version") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(
                f"receipt has format version {got!r}, this Lathe reads {min(FORMAT_VERSIONS)} to {max(FORMAT_VERSIONS)}"
            )
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
                "digests": dict(raw["digests"]),
                "same_as": {
                    source["uri"]: raw["same_as"][source["uri"]] for source in shard["objects"] if raw["same_as"]
                },
                "empty": tuple(raw["empty"]),
                "recovered": tuple((uri, key) for uri, key in raw["recovered"]),
                "videos": None if raw.get("videos") is None else tuple(raw["videos"]),
            }
        )

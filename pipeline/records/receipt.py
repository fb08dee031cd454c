"""Results: files that were written, counts, statistics, and the receipt that holds them. Plain, frozen, picklable values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.records.flow import Reject, Shard, shard_from_dict

FORMAT_VERSIONS = (1, 2)
"""Format versions of outputs. A receipt has that of its output; versions differ in the names of objects, see `format.layout`."""


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
    ranges: dict[str, list[Any]] = field(default_factory=dict)
    """Least and greatest value of `id`, `fps` and `num_frames` over all rows; empty in receipts of version 1."""


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
    damaged: int = 0  # damaged inputs, samples and regions: what the reject budget looks at
    # Damage of a tar that belongs to no sample (a truncated end, a broken header); part of `damaged`.
    damaged_regions: int = 0

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
    empty: tuple[str, ...] = ()  # URIs of plain files that gave no clip
    # What was odd in inputs that were encoded: counters of the reader, encoded samples by kind of row warning, `no_caption`. A retry
    # counts only samples that no earlier receipt holds.
    warnings: dict[str, int] = field(default_factory=dict)
    recovered: tuple[tuple[str, str], ...] = ()  # of a retry: (uri, key) of samples that have clips now and had none

    def added(self) -> Counts:
        """What this receipt adds to the counts of an output. A retry replaces what an earlier receipt says of the same samples."""
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
            }
        )

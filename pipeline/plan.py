"""What a build would do, from headers: which buckets fill, what is dropped and why, how many bytes it writes. For `lathe plan`.

Enters: samples and rejects as the reader gives them, the resolved rules and limits. Leaves: a `CorpusPlan`.

Each video is opened, its packets are listed and its first frame is decoded (rotation and interlacing are told nowhere else); no
other frame is. Damage inside a stream therefore stays unseen until the build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.clips import grid_length, whole_frames
from pipeline.config import DecodeConfig, DrillConfig, validate
from pipeline.cutting import CutRequest, Cutter
from pipeline.errors import BadDataError, PolicyReject
from pipeline.records import ClipPlan, ClipRules, OpenedVideo, Reject, Sample, warning_kinds

EXAMPLES = 5  # keys named for each reason


@dataclass(frozen=True, slots=True)
class LatentSize:
    """What is stored of a clip. `tensors` is 2 with moments."""

    channels: int
    bytes_per_element: int
    time_stride: int
    space_stride: int
    tensors: int = 1
    lead_frames: int = 1

    def num_bytes(self, frames: int, height: int, width: int) -> int:
        """Bytes of the latents of a clip of that many pixels and frames; containers add a few per cent."""
        steps = (frames - self.lead_frames) // self.time_stride + self.lead_frames
        cells = steps * (height // self.space_stride) * (width // self.space_stride)
        return cells * self.channels * self.bytes_per_element * self.tensors


@dataclass(slots=True)
class BucketFill:
    """Clips of one bucket, their pixel frames and seconds, the bytes of their latents."""

    clips: int = 0
    frames: int = 0
    seconds: float = 0.0
    latent_bytes: int = 0


@dataclass(slots=True)
class Dropped:
    """Inputs refused for one reason, with the first few keys."""

    policy: bool
    count: int = 0
    keys: list[str] = field(default_factory=list)
    message: str = ""  # of the first one


@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """The answer. `samples = with_clips + without_clips`; `warnings` as in receipts, see `Receipt.warnings`."""

    samples: int
    with_clips: int
    without_clips: int
    clips: int
    frames: int
    video_seconds: float  # of the videos that opened
    clip_seconds: float
    latent_bytes: int
    buckets: dict[str, BucketFill]
    dropped: dict[str, Dropped]
    warnings: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def plan_corpus(
    items: Iterable[Sample | Reject],
    rules: ClipRules,
    limits: DecodeConfig,
    latent: LatentSize,
    counters: dict[str, int] | None = None,
) -> CorpusPlan:
    """Goes through `items` once and holds one video at a time. Bad data is counted; other errors pass through.

    `counters` are the reader's, read at the end: they are warnings too.
    """
    tally = _Tally(rules, latent)
    for item in items:
        if isinstance(item, Reject):
            tally.refuse(item)
            tally.settle(is_sample=item.key is not None, clips=0)
            continue
        # Chunks are never asked for, so their size does not matter, and no drill is reached.
        cutter = Cutter(CutRequest(item, rules, limits, 0, validate(DrillConfig, {})))
        try:
            opened = cutter.open()
        except BadDataError as error:
            policy = isinstance(error, PolicyReject)
            tally.refuse(Reject(item.key, "decode", error.reason, error.message, policy, uri=item.uri))
            tally.settle(is_sample=True, clips=0)
            continue
        finally:
            cutter.close()
        tally.take(item, opened)
        tally.settle(is_sample=True, clips=len(opened.clips))
    tally.warn(counters or {})
    return tally.result()


class _Tally:
    def __init__(self, rules: ClipRules, latent: LatentSize) -> None:
        self._rules, self._latent = rules, latent
        self._samples = self._with_clips = 0
        self._video_seconds = 0.0
        self._buckets: dict[str, BucketFill] = {}
        self._dropped: dict[str, Dropped] = {}
        self._warnings: Counter[str] = Counter()

    def settle(self, *, is_sample: bool, clips: int) -> None:
        self._samples += is_sample
        self._with_clips += clips > 0

    def refuse(self, reject: Reject) -> None:
        dropped = self._dropped.setdefault(reject.reason, Dropped(reject.policy, message=reject.message))
        dropped.count += 1
        if len(dropped.keys) < EXAMPLES:
            dropped.keys.append(reject.key or reject.uri or "?")

    def warn(self, counters: dict[str, int]) -> None:
        self._warnings.update(counters)

    def take(self, sample: Sample, opened: OpenedVideo) -> None:
        self._video_seconds += opened.info.duration_s
        if opened.clips:
            self._warnings.update(warning_kinds(sample, opened.info.warnings))
        for reject in opened.rejects:
            self.refuse(reject)
        for clip in opened.clips:
            self._add(clip, opened)

    def _add(self, clip: ClipPlan, opened: OpenedVideo) -> None:
        available = grid_length(opened.info.num_frames, opened.info.duration_s, self._rules.fps)
        frames = clip.bucket.frames or whole_frames(available, self._rules.time_stride, self._rules.lead_frames)
        fill = self._buckets.setdefault(str(clip.bucket), BucketFill())
        fill.clips += 1
        fill.frames += frames
        fill.seconds += frames / clip.fps
        fill.latent_bytes += self._latent.num_bytes(frames, clip.bucket.height, clip.bucket.width)

    def result(self) -> CorpusPlan:
        fills = self._buckets.values()
        return CorpusPlan(
            samples=self._samples,
            with_clips=self._with_clips,
            without_clips=self._samples - self._with_clips,
            clips=sum(fill.clips for fill in fills),
            frames=sum(fill.frames for fill in fills),
            video_seconds=self._video_seconds,
            clip_seconds=sum(fill.seconds for fill in fills),
            latent_bytes=sum(fill.latent_bytes for fill in fills),
            buckets=dict(sorted(self._buckets.items())),
            dropped=dict(sorted(self._dropped.items(), key=lambda item: -item[1].count)),
            warnings=dict(sorted(self._warnings.items())),
        )

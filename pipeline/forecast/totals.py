"""Sums of a forecast: clips of each bucket, drops with their reasons, bytes of latents.

Takes opened videos and rejects, the resolved clip rules, the size of a latent. Gives a `Forecast`. Opening a video lists its packets and
decodes its first frame, which alone shows rotation and interlacing; damage after that frame is found only by the build.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.records import is_mask, warning_kinds
from pipeline.video.clips import frames_of, grid_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.forecast.compile_forecast import CompileForecast
    from pipeline.records import ClipPlan, ClipRules, OpenedVideo, Reject, Sample

EXAMPLES = 5  # keys named for each reason
FIRST_FRAME_BYTES = 0.4
"""Bytes a pixel of a first frame of real video, lossless WebP: 0.31 and 0.50 were measured (docs/i2v.md)."""


@dataclass(frozen=True, slots=True)
class LatentSize:
    """Shape and type of the tensors stored for a clip. `tensors`: 1, and one more for moments and `i2v_cond` each, no paired videos."""

    channels: int
    bytes_per_element: int
    time_stride: int
    space_stride: int
    tensors: int = 1
    lead_frames: int = 1
    first_frames: bool = False  # whether first frames are stored

    def num_bytes(self, frames: int, height: int, width: int, members: int = 0, masks: int = 0) -> int:
        """Bytes of a clip's latents before compression; height and width in pixels. The file format adds a few per cent.

        `members`, `masks`: paired videos of the clip that are encoded, and that are averaged.
        """
        steps = (frames - self.lead_frames) // self.time_stride + self.lead_frames
        cells = steps * (height // self.space_stride) * (width // self.space_stride)
        return cells * self.bytes_per_element * (self.channels * (self.tensors + members) + masks)


@dataclass(slots=True)
class BucketFill:
    """Sums over the clips of one bucket: pixel frames, seconds, bytes of latents."""

    clips: int = 0
    frames: int = 0
    seconds: float = 0.0
    latent_bytes: int = 0


@dataclass(slots=True)
class Dropped:
    """Inputs that are rejected for one reason, with the first few keys."""

    policy: bool
    count: int = 0
    keys: list[str] = field(default_factory=list)
    message: str = ""  # of the first one


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a build would do. `samples = with_clips + without_clips`; `warnings` are those of `Receipt.warnings`; `notices` are lines about
    inputs that are not counted in `samples`.
    """

    samples: int
    with_clips: int
    without_clips: int
    clips: int
    frames: int
    video_seconds: float  # of the videos that opened
    clip_seconds: float
    latent_bytes: int  # before compression
    first_frame_bytes: int  # estimate, 0 where none is stored
    buckets: dict[str, BucketFill]
    dropped: dict[str, Dropped]
    warnings: dict[str, int]
    notices: list[str]
    passed_over: dict[str, Any] = field(default_factory=dict)  # objects in the inputs that are not encoded, by kind
    compile: CompileForecast | None = None  # of a build into a new output

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


class ForecastTotals:
    """Sums over a corpus, sample by sample. Their order only decides which keys are named as examples."""

    def __init__(self, rules: ClipRules, latent: LatentSize) -> None:
        self._rules, self._latent = rules, latent
        self._samples = self._with_clips = 0
        self._video_seconds = 0.0
        self._first_frame_pixels = 0
        self._buckets: dict[str, BucketFill] = {}
        self._dropped: dict[str, Dropped] = {}
        self._warnings: dict[str, int] = {}
        self._notices: list[str] = []

    def opened(self, sample: Sample, video: OpenedVideo) -> None:
        """A sample whose video opened, whether or not it gives clips."""
        self._samples += 1
        self._with_clips += bool(video.clips)
        self._video_seconds += video.info.duration_s
        if video.clips:
            of_clips = [warning for clip in video.clips for warning in clip.warnings]
            self.warn(Counter(warning_kinds(sample, [*video.info.warnings, *of_clips])))
        for reject in video.rejects:
            self._drop(reject)
        for clip in video.clips:
            self._add(clip, video, sample)

    def rejected(self, reject: Reject) -> None:
        """A sample without an open video, or damage that has no sample (a truncated tar)."""
        self._samples += reject.key is not None
        self._drop(reject)

    def warn(self, counters: Mapping[str, int]) -> None:
        """Adds to the warnings, by slug."""
        for slug, count in counters.items():
            self._warnings[slug] = self._warnings.get(slug, 0) + count

    def notice(self, text: str) -> None:
        """One more line for the user."""
        self._notices.append(text)

    def _drop(self, reject: Reject) -> None:
        dropped = self._dropped.setdefault(reject.reason, Dropped(reject.policy, message=reject.message))
        dropped.count += 1
        if len(dropped.keys) < EXAMPLES:
            dropped.keys.append(reject.key or reject.uri or "?")

    def _add(self, clip: ClipPlan, opened: OpenedVideo, sample: Sample) -> None:
        available = grid_length(opened.info.num_frames, opened.info.duration_s, self._rules.fps)
        frames = frames_of(clip, available, self._rules)
        fill = self._buckets.setdefault(str(clip.bucket), BucketFill())
        fill.clips += 1
        fill.frames += frames
        fill.seconds += frames / clip.fps if clip.fps else 0.0  # an image lasts no time
        self._first_frame_pixels += clip.bucket.height * clip.bucket.width * self._latent.first_frames
        masks = sum(is_mask(member.name) for member in sample.members)
        sizes = clip.bucket.height, clip.bucket.width, len(sample.members) - masks, masks
        fill.latent_bytes += self._latent.num_bytes(frames, *sizes)

    def result(self) -> Forecast:
        """The sums so far."""
        fills = self._buckets.values()
        return Forecast(
            samples=self._samples,
            with_clips=self._with_clips,
            without_clips=self._samples - self._with_clips,
            clips=sum(fill.clips for fill in fills),
            frames=sum(fill.frames for fill in fills),
            video_seconds=self._video_seconds,
            clip_seconds=sum(fill.seconds for fill in fills),
            latent_bytes=sum(fill.latent_bytes for fill in fills),
            first_frame_bytes=round(self._first_frame_pixels * FIRST_FRAME_BYTES),
            buckets=dict(sorted(self._buckets.items())),
            dropped=dict(sorted(self._dropped.items(), key=lambda item: (-item[1].count, item[0]))),
            warnings=dict(sorted(self._warnings.items())),
            notices=self._notices,
        )

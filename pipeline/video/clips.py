"""Choice of the clips of a video, from its frame times and size: takes `VideoInfo`, times and `ClipRules`, returns `ClipPlan`s or a reject.

Position k of the sampling grid is at time k / fps (at source rate it is frame k). The frame on screen there is the last one that is not
later. A clip is a run of positions, scaled to cover its bucket and cropped (`crops`); it may have several variants.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import parse_bucket, parse_size
from pipeline.errors import ConfigError
from pipeline.records import FLIP, Bucket, ClipPlan, ClipRules, Reject, VideoInfo
from pipeline.video.crops import plan_variants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pipeline.config import ClipConfig
    from pipeline.video.decode.cropping import Window
    from pipeline.video.spans import Place

ROUNDING_S = 0.000501  # Matroska and FLV round times to milliseconds: a frame half a tick late still counts as on time
SAME_ASPECT = 1e-9
MOST_AT_ONCE = 16  # clips of spans that share a frame: each holds a chunk of frames here and a state of the network
MOST_RUNS_AT_ONCE = 128  # their variants together: as many as one clip of 64 random crops and their mirrored ones has
WHOLE_CLIP = 1 << 20  # frames: more than any clip has. Chunk length of networks that encode a clip in one step


# --- the job's rules --------------------------------------------------------------------------------------------------


def resolve_rules(
    config: ClipConfig, time_stride: int, space_stride: int, network: str, lead_frames: int = 1
) -> ClipRules:
    """The job's clip section, resolved for a network that takes `time_stride * n + lead_frames` frames (`lead_frames` is 1 or 0).

    Raises:
        ConfigError: frame counts or sizes that the network does not take; the message names near ones that it takes.
    """
    rule = config.select.removeprefix("spans").removeprefix(":") or "head"
    select, _, argument = rule.partition(":")
    whole = select == "whole"
    area = None
    if config.buckets:
        buckets = [parse_bucket(text) for text in config.buckets]
        for bucket in buckets:
            _check_frames("clips.buckets", bucket.frames, time_stride, lead_frames, network)
            check_size("clips.buckets", bucket.height, bucket.width, space_stride, network)
        if whole:
            buckets = [Bucket(0, bucket.height, bucket.width) for bucket in buckets]
        frame_counts = tuple(sorted({bucket.frames for bucket in buckets}))
    else:
        frame_counts = (0,) if whole else tuple(sorted(set(config.frames)))
        for frames in frame_counts:
            if not whole:
                _check_frames("clips.frames", frames, time_stride, lead_frames, network)
        if config.size[0].startswith("area:"):
            height, width = parse_size(config.size[0].removeprefix("area:"))
            area, buckets = height * width, []
            check_multiple("clips", config.multiple_of, area, space_stride, network)
        else:
            sizes = [parse_size(text) for text in config.size]
            for height, width in sizes:
                check_size("clips.size", height, width, space_stride, network)
            buckets = [Bucket(frames, *size) for frames in frame_counts for size in sizes]
    crop, _, crops = config.crop.partition(":")
    return ClipRules(
        select=select,  # type: ignore[arg-type]  # the configuration's pattern admits nothing else
        select_arg=int(argument or 0),
        fps=None if config.fps == "source" else float(config.fps),
        frame_counts=frame_counts,
        buckets=tuple(sorted(set(buckets))),
        area=area,
        multiple_of=config.multiple_of,
        upscale=config.upscale,
        min_fps_ratio=config.min_fps_ratio,
        time_stride=time_stride,
        space_stride=space_stride,
        lead_frames=lead_frames,
        crop=crop,  # type: ignore[arg-type]  # as above
        crops=int(crops or 0),
        flip=FLIP in config.variants,
        spans=config.in_spans,
        spans_field=config.spans_field if config.in_spans else "",
        spans_unit=config.spans_unit if config.in_spans else "",
    )


def _check_frames(field: str, frames: int, stride: int, lead: int, network: str) -> None:
    rest = (frames - lead) % stride
    if rest or frames < lead:
        near = f"{frames - rest} or {frames - rest + stride}" if frames > rest else f"{stride}"
        rule = f"{stride}n+{lead}" if lead else f"{stride}n"
        raise ConfigError(f"{field}: {network} takes {rule} frames, got {frames}; counts near it that fit: {near}")


def check_size(field: str, height: int, width: int, stride: int, network: str) -> None:
    """Raises ConfigError if the network does not take frames of this size, in pixels."""
    if height % stride or width % stride:
        near = "x".join(str(max(stride, round(side / stride) * stride)) for side in (height, width))
        raise ConfigError(
            f"{field}: {network} takes sides that are multiples of {stride}, got {height}x{width}; near it: {near}"
        )


def check_multiple(section: str, multiple: int, area: int, stride: int, network: str) -> None:
    """Raises ConfigError if buckets of `area` pixels cannot be derived with sides that are multiples of `multiple`."""
    if multiple % stride:
        near = math.ceil(multiple / stride) * stride
        raise ConfigError(
            f"{section}.multiple_of: {network} takes sides that are multiples of {stride}, got {multiple}; near it: {near}"
        )
    if multiple * multiple > area:
        raise ConfigError(f"{section}.size: an area of {area} pixels holds no {multiple}x{multiple} block")


def chunk_length(chunk_frames: int, time_stride: int, *, chunked: bool = True) -> int:
    """Frames per encode step after the first one: `chunk_frames` rounded down to the time stride, or `WHOLE_CLIP` if not `chunked`."""
    return max(time_stride, chunk_frames // time_stride * time_stride) if chunked else WHOLE_CLIP


# --- the sampling grid ------------------------------------------------------------------------------------------------


def _tolerance_s(fps: float) -> float:
    return min(ROUNDING_S, 0.25 / fps)


def grid_length(num_frames: int, end_s: float, fps: float | None) -> int:
    """Number of grid positions: of frames at source rate (`fps` None), else of all k with k / fps before the end of the video."""
    if fps is None:
        return num_frames
    return max(1, math.ceil((end_s - _tolerance_s(fps)) * fps))


def frames_on_screen(times_s: np.ndarray, start: int, stop: int, fps: float | None) -> np.ndarray:
    """Index (int64, not descending) of the frame on screen at each grid position of `[start, stop)`. `times_s` (float64) ascend from 0."""
    positions = np.arange(start, stop, dtype=np.int64)
    if fps is None:
        return positions
    late_s = positions / fps + _tolerance_s(fps)
    return np.searchsorted(times_s, late_s, side="right").astype(np.int64) - 1


# --- choice -----------------------------------------------------------------------------------------------------------


def choose_clips(
    info: VideoInfo,
    times_s: np.ndarray,
    end_s: float,
    rules: ClipRules,
    *,
    key: str | None = None,
    uri: str | None = None,
    content: Callable[[int, int], Window | None] = lambda start, stop: None,
    places: Sequence[Place] | None = None,
) -> tuple[tuple[ClipPlan, ...], tuple[Reject, ...]]:
    """The clips of a video by their start, each with its variants, or none and a policy reject (`too_short`, `too_small`, `fps_too_low`).

    `times_s` (float64) are the times of the shown frames from 0, `end_s` is the end of the last one, in seconds. A `whole` clip has
    `bucket.frames` 0 and takes `whole_frames(...)` positions. `key` and `uri` go into the reject. `content`: what is inside the black bars
    of the positions `[start, stop)`, None without bars; clips whose content is too small are left out, with a reject. `places`: the
    annotated spans to cut inside, None: the whole video. Spans that no clip fits are left out, with a reject. If more than `MOST_AT_ONCE`
    clips of spans share a frame, there are none, and the reject is `overlapping_spans`: planning ends there.
    """

    def refused(
        reason: str, message: str, buckets: dict[str, int] | None = None
    ) -> tuple[tuple[ClipPlan, ...], tuple[Reject, ...]]:
        return (), (Reject(key, "clips", reason, message, policy=True, uri=uri, buckets=buckets or {}),)

    available = grid_length(len(times_s), end_s, rules.fps)
    if rules.fps is not None and info.fps < rules.min_fps_ratio * rules.fps:
        return refused(
            "fps_too_low",
            f"{info.fps:g} frames per second; clips.fps {rules.fps:g} with clips.min_fps_ratio {rules.min_fps_ratio:g} "
            f"needs {rules.min_fps_ratio * rules.fps:g}",
            _nearest(info, available, rules),
        )
    offered = _offered(info, rules)
    shortest = min((bucket.frames for bucket in rules.buckets), default=min(rules.frame_counts))
    shortest = shortest or rules.lead_frames or rules.time_stride  # 0: the whole video, of any length
    if available < shortest:
        message = f"{available} frames at the sampling rate, the shortest clip needs {shortest}"
        return refused("too_short", message, _nearest(info, available, rules))
    fitting = [bucket for bucket in offered if bucket.frames <= available]
    if not offered or not fitting:
        wanted = ", ".join(sorted({f"{b.height}x{b.width}" for b in rules.buckets})) or f"an area of {rules.area}"
        return refused(
            "too_small",
            f"{info.height}x{info.width} pixels for {available} frames would have to be enlarged to {wanted}; "
            "set clips.upscale to allow it",
            _nearest(info, available, rules),
        )
    fps = info.fps if rules.fps is None else rules.fps
    clips: list[ClipPlan] = []
    small: list[Window] = []
    rejects: list[Reject] = []
    least = max(shortest, min(bucket.frames for bucket in offered))
    long = None if places is None else [place for place in places if place.stop - place.start >= least]
    ends: list[int] = []  # of clips of spans that share the frame at `start`, a heap
    most = max(1, min(MOST_AT_ONCE, MOST_RUNS_AT_ONCE // len(rules.variants)))
    for start, placed, place in _in_order(info, offered, available, rules, long):
        stop = available if place is None else place.stop
        frames = placed.frames or whole_frames(stop - start, rules.time_stride, rules.lead_frames)
        inside = content(start, start + frames)
        bucket = placed if inside is None else _for_content(inside, placed.frames, rules)
        if bucket is None:
            small += [inside] if inside is not None else []
            continue
        start_s = float(times_s[start]) if rules.fps is None else start / rules.fps
        if place is not None:
            while ends and ends[0] <= start:
                heapq.heappop(ends)
            heapq.heappush(ends, start + frames)
        if len(ends) > most:
            return refused(
                "overlapping_spans",
                f"at {start_s:.3f} s more than {most} clips of its annotated spans share a frame; annotate fewer that overlap",
            )
        plans = plan_variants(len(clips), start, start_s, bucket, fps, info, rules, inside)
        clips += plans if place is None else [_of_span(plan, place) for plan in plans]
    if places is not None and long is not None and len(long) < len(places):
        first = next(place for place in places if place.stop - place.start < least)
        message = (
            f"{len(places) - len(long)} of {len(places)} annotated spans are shorter than the shortest clip, which needs {least} frames; "
            f"the first: span {first.span} has {first.stop - first.start} at the sampling rate"
        )
        rejects += refused("too_short", message)[1]
    if small:
        shown = f"{small[0].height}x{small[0].width}"
        message = f"{len(small)} clips show {shown} pixels inside black bars, too few for a bucket; set clips.upscale to allow it"
        rejects += refused("too_small", message)[1]
    return tuple(clips), tuple(rejects)


def _in_order(
    info: VideoInfo, offered: list[Bucket], available: int, rules: ClipRules, places: Sequence[Place] | None
) -> Iterable[tuple[int, Bucket, Place | None]]:
    """Start position, bucket and annotated span of each clip, by start; made one by one, as 10,000 long spans have millions."""
    if places is None:
        return ((start, bucket, None) for start, bucket in _place(info, offered, available, rules))
    of_spans = (_inside(info, offered, place, rules) for place in places)
    return heapq.merge(*of_spans, key=lambda item: (item[0], item[2].span))


def _inside(
    info: VideoInfo, offered: list[Bucket], place: Place, rules: ClipRules
) -> Iterator[tuple[int, Bucket, Place]]:
    for start, bucket in _place(info, offered, place.stop - place.start, rules):
        yield place.start + start, bucket, place


def _of_span(plan: ClipPlan, place: Place) -> ClipPlan:
    return replace(plan, span=place.span, stop=place.stop, warnings=(*plan.warnings, *place.warnings))


def frames_of(plan: ClipPlan, available: int, rules: ClipRules) -> int:
    """Number of grid positions of a clip, whose video has `available`."""
    stop = available if plan.stop is None else plan.stop
    return plan.bucket.frames or whole_frames(stop - plan.start, rules.time_stride, rules.lead_frames)


def whole_frames(available: int, time_stride: int, lead_frames: int = 1) -> int:
    """The longest `time_stride * n + lead_frames` that `available` grid positions hold."""
    return (available - lead_frames) // time_stride * time_stride + lead_frames


def uncovered_tail(clips: tuple[ClipPlan, ...], available: int, rules: ClipRules) -> int:
    """Grid positions after the last clip; 0 for rules that are not meant to cover the whole video (head, uniform, spans)."""
    if not clips or rules.spans or rules.select in ("head", "uniform"):
        return 0
    last = clips[-1]
    return available - last.start - frames_of(last, available, rules)


def _place(info: VideoInfo, offered: list[Bucket], available: int, rules: ClipRules) -> Iterable[tuple[int, Bucket]]:
    """Start position and bucket of each clip."""
    bucket = _choose(info, offered, available)
    if rules.select in ("head", "whole"):
        return [(0, bucket)]
    if rules.select == "slide":
        return [(start, bucket) for start in range(0, available - bucket.frames + 1, rules.select_arg)]
    if rules.select == "uniform":
        count = min(rules.select_arg, available // bucket.frames)
        last_start = available - bucket.frames
        # One clip is at the start; several are spread evenly over the video, without overlap.
        return [(last_start * n // max(1, count - 1), bucket) for n in range(count)]
    return _tile(info, offered, available)


def _tile(info: VideoInfo, offered: list[Bucket], available: int) -> Iterable[tuple[int, Bucket]]:
    start, shortest = 0, min(bucket.frames for bucket in offered)
    while available - start >= shortest:
        bucket = _choose(info, offered, available - start)
        yield start, bucket
        start += bucket.frames


def _offered(info: VideoInfo | Window, rules: ClipRules) -> list[Bucket]:
    """Buckets that this video is large enough for, of any length."""
    if rules.area is not None:
        height, width = _derived_size(info.width / info.height, rules.area, rules.multiple_of)
        candidates = [Bucket(frames, height, width) for frames in rules.frame_counts]
    else:
        candidates = list(rules.buckets)
    return [b for b in candidates if rules.upscale or (b.height <= info.height and b.width <= info.width)]


def _nearest(info: VideoInfo, available: int, rules: ClipRules) -> dict[str, int]:
    """The bucket of a refused video, once, by name: as if it were large enough, and long enough for the shortest."""
    every = _offered(info, replace(rules, upscale=True))
    return {_choose(info, every, max(available, min(bucket.frames for bucket in every))).name: 1}


def _for_content(inside: Window, frames: int, rules: ClipRules) -> Bucket | None:
    """The bucket of `frames` frames for what is inside black bars; None if it is too small for all."""
    offered = [bucket for bucket in _offered(inside, rules) if bucket.frames == frames]
    return _choose(inside, offered, frames) if offered else None


def _derived_size(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """Height and width in multiples of `multiple`, of at most `area` pixels: nearest to `aspect` (width / height), then the largest."""
    best = (math.inf, 0, multiple, multiple)
    for height in range(multiple, area // multiple + 1, multiple):
        width = area // height // multiple * multiple
        distance = abs(math.log(width / height / aspect))
        best = min(best, (distance, -height * width, height, width))
    return best[2], best[3]


def _choose(info: VideoInfo | Window, offered: list[Bucket], available: int) -> Bucket:
    """The longest bucket that fits, then that of the nearest aspect ratio, then the largest."""
    frames = max(bucket.frames for bucket in offered if bucket.frames <= available)
    aspect = info.width / info.height

    def rank(bucket: Bucket) -> tuple[float, int, Bucket]:
        distance = abs(math.log(bucket.width / bucket.height / aspect))
        return round(distance / SAME_ASPECT), -bucket.height * bucket.width, bucket

    return min((bucket for bucket in offered if bucket.frames == frames), key=rank)

"""Cutter of the clips of one video, run inside a decoder process.

Takes a `CutRequest`; returns an `OpenedVideo`, then one `FrameChunk` or `ClipFailed` per call in clip order, then `VideoEnded`. Chunks of
the variants of a clip take turns. It reads the stream once (with `letterbox` twice, see `black_bars`) and scales each frame once for all
variants. Scaled frames that the next clip shares are kept, at most one clip of them. Clips of annotated spans overlap in any way: they are
cut side by side, each with one chunk in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.config import DecodeConfig, DrillConfig
from pipeline.errors import BadDataError
from pipeline.process import kill_points
from pipeline.records import (
    ClipFailed,
    ClipPlan,
    ClipRules,
    EncodedVideo,
    FrameChunk,
    OpenedVideo,
    Reject,
    StillOpening,
    VideoEnded,
)
from pipeline.video import clips, spans
from pipeline.video.black_bars import BlackBars
from pipeline.video.decode import Shown, Video, open_again
from pipeline.video.decode.planes import Geometry
from pipeline.video.first_frame import lossless_image
from pipeline.video.images import Pictures, open_media

if TYPE_CHECKING:
    from pipeline.video.decode.cropping import Window

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CutRequest:
    """Request to a decoder: a video, the clip rules and the limits of decoding."""

    video: EncodedVideo
    rules: ClipRules
    limits: DecodeConfig
    chunk_frames: int  # per chunk after the first; 0: each clip is one chunk
    drill: DrillConfig
    etag: str | None = None  # of the object that holds the video, if known
    headers_only: bool = False  # the video is opened and closed; nothing is cut
    first_frame: bool = False  # first chunks carry their first frame as an image file


class Cutter:
    """Cutting of one video: `open` once, then `next` until it returns `VideoEnded`; it returns that again if called once more."""

    def __init__(self, request: CutRequest) -> None:
        """Opens nothing; `open` does."""
        self._request = request
        self._video: Video | Pictures | None = None
        self._answers: Iterator[StillOpening | OpenedVideo | FrameChunk | ClipFailed] = iter(())
        self._cpu_s = 0.0
        self._frames_decoded = 0

    def open(self) -> OpenedVideo | StillOpening:
        """Opens the video and chooses its clips. `StillOpening`: calls of `next` go on with it.

        Raises:
            DamagedInput, PolicyReject: see `decode.open_video`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read, here and in `next`.
        """
        return self._timed(self._open)

    def next(self) -> StillOpening | OpenedVideo | FrameChunk | ClipFailed | VideoEnded:
        """The next chunk, the next clip that fails, or the end. After `StillOpening` what `open` returns and raises."""
        answer = self._timed(lambda: next(self._answers, None))
        if answer is not None:
            return answer
        self.close()
        return VideoEnded(self._frames_decoded, self._cpu_s)

    def close(self) -> None:
        """Releases the video; safe to call twice."""
        self._answers = iter(())
        if self._video is not None:
            self._frames_decoded += self._video.frames_decoded
            self._video.close()
            self._video = None

    def _timed(self, work: Callable[[], Result]) -> Result:
        # Decoding is single-threaded: its CPU time is this thread's.
        started = time.thread_time()
        try:
            return work()
        finally:
            self._cpu_s += time.thread_time() - started

    def _open(self) -> OpenedVideo | StillOpening:
        rules = self._request.rules
        self._video = video = open_media(self._request.video, self._request.limits, rules.images)
        if video.info.is_image:
            self._request = replace(self._request, rules=rules.of_images())
        planned, rejects = self._choose(video)
        if self._request.rules.crop == "letterbox" and planned:
            self._answers = self._look_for_bars(video, planned)
            return StillOpening()
        return self._opened(video, planned, rejects)

    def _look_for_bars(
        self, video: Video | Pictures, planned: tuple[ClipPlan, ...]
    ) -> Iterator[StillOpening | OpenedVideo]:
        """Looks through the frames of the clips that are planned without regard to bars, then plans them anew."""
        rules, available = self._request.rules, self._available(video)
        frames = [_frames(plan, video.times_s, available, rules) for plan in planned]
        bars = BlackBars(np.unique(np.concatenate(frames)), video.info.height, video.info.width)
        for _ in bars.look(video):
            yield StillOpening()

        def inside(start: int, stop: int) -> Window | None:
            if rules.select == "slide":  # clips that share scaled frames must have the same bars
                return bars.inside()
            return bars.inside(clips.frames_on_screen(video.times_s, start, stop, rules.fps))

        again, rejects = self._choose(video, inside)
        if isinstance(video, Video):
            self.close()
            if again and not self._request.headers_only:
                encoded, limits = self._request.video.video, self._request.limits
                self._video = open_again(encoded, limits, video.info.content_hash)
        yield self._opened(self._video or video, again, rejects)

    def _choose(
        self, video: Video | Pictures, content: Callable[[int, int], Window | None] = lambda start, stop: None
    ) -> tuple[tuple[ClipPlan, ...], tuple[Reject, ...]]:
        encoded, rules = self._request.video, self._request.rules
        places: list[spans.Place] | None = None
        rejects: tuple[Reject, ...] = ()
        if rules.spans:
            places, rejects = spans.place_spans(encoded, video.times_s, video.end_s, rules)
            if not places:
                return (), rejects
        planned, others = clips.choose_clips(
            video.info,
            video.times_s,
            video.end_s,
            rules,
            key=encoded.key,
            uri=encoded.uri,
            content=content,
            places=places,
        )
        if rules.spans and (crowd := spans.crowded(planned, self._available(video), rules, encoded)) is not None:
            return (), (*rejects, crowd)
        return planned, (*rejects, *others)

    def _available(self, video: Video | Pictures) -> int:
        return clips.grid_length(len(video.times_s), video.end_s, self._request.rules.fps)

    def _opened(
        self, video: Video | Pictures, planned: tuple[ClipPlan, ...], rejects: tuple[Reject, ...]
    ) -> OpenedVideo:
        encoded, rules = self._request.video, self._request.rules
        info, available = video.info, self._available(video)
        if tail := clips.uncovered_tail(planned, available, rules):
            info = replace(info, warnings=(*info.warnings, f"tail_frames:{tail}"))
        if (
            rules.select == "uniform"
            and not rules.spans
            and 0 < (found := len(planned) // len(rules.variants)) < rules.select_arg
        ):
            info = replace(info, warnings=(*info.warnings, f"uniform_clips:{found}/{rules.select_arg}"))
        if damage := video.incomplete:
            # Clips can be cut from the frames that are there, but not one of the whole video.
            planned = () if rules.select == "whole" and not rules.spans else planned
            there = info.num_frames
            truncated = Reject(
                encoded.key, "decode", "truncated", damage, False, uri=encoded.uri, frames_recovered=there
            )
            rejects = (*rejects, truncated)
        cut = _cut_together if rules.spans else _cut
        self._answers = cut(video, planned, available, self._request) if planned else iter(())
        return OpenedVideo(info, planned, rejects)


def _frames(plan: ClipPlan, times_s: np.ndarray, available: int, rules: ClipRules) -> np.ndarray:
    """Index (int64) of the frame on screen at each position of a clip."""
    count = clips.frames_of(plan, available, rules)
    return clips.frames_on_screen(times_s, plan.start, plan.start + count, rules.fps)


def _borders(count: int, request: CutRequest) -> tuple[int, ...]:
    """Borders of the chunks of a clip of `count` frames."""
    rules = request.rules
    if not request.chunk_frames:
        return 0, count
    step = clips.chunk_length(request.chunk_frames, rules.time_stride)
    return 0, *range(min(count, rules.lead_frames + step), count, step), count


class _Variants:
    """Windows of the variants of one clip in its scaled frames. `shared`: one that holds all of them, the same for clips that overlap."""

    def __init__(self, plans: tuple[ClipPlan, ...], rules: ClipRules) -> None:
        first = plans[0]
        self._plans, self._size = plans, (first.bucket.height, first.bucket.width)
        self._at, size = (first.crop_top, first.crop_left), self._size
        if rules.crop == "random":
            self._at, size = (0, 0), (first.scaled_height, first.scaled_width)
        self.shared = Geometry(first.scaled_height, first.scaled_width, *self._at, *size)

    def of(self, shared_T3HW: np.ndarray) -> Iterator[tuple[ClipPlan, np.ndarray]]:
        """Each variant with its planes, uint8 `(T, 3, height, width)` in memory of its own. One at a time: of 64 crops and their mirrored
        frames only the shared window is held, and what the caller holds.
        """
        height, width = self._size
        for plan in self._plans:
            top, left = plan.crop_top - self._at[0], plan.crop_left - self._at[1]
            shown_T3HW = shared_T3HW[:, :, top : top + height, left : left + width]
            if plan.mirrored:
                shown_T3HW = shown_T3HW[..., ::-1]
            is_all = len(self._plans) == 1 and shown_T3HW.shape == shared_T3HW.shape
            yield plan, shared_T3HW if is_all else shown_T3HW.copy()

    def chunks(self, shared: FrameChunk, request: CutRequest) -> Iterator[FrameChunk]:
        """The chunk of each variant, from one of their shared window."""
        for plan, planes_T3HW in self.of(shared.planes_T3HW):
            wanted = shared.first and request.first_frame
            image = lossless_image(planes_T3HW[0], shared.color_matrix) if wanted else None
            yield replace(shared, clip=plan.index, planes_T3HW=planes_T3HW, first_frame=image)


class _ScaledFrames:
    """Scaled frames of a video, asked for in ascending order but for those that were kept for an overlapping clip."""

    def __init__(self, video: Video | Pictures) -> None:
        self._video = video
        self._kept: dict[tuple[int, Geometry], tuple[np.ndarray, bool]] = {}

    def write(self, index: int, out_3HW: np.ndarray, geometry: Geometry, *, keep: bool) -> bool:
        """Fills `out_3HW` with the frame at `index` and keeps a copy if `keep`. Returns whether the frame is damaged."""
        kept = self._kept.get((index, geometry))
        if kept is not None:
            out_3HW[:], damaged = kept
            return damaged
        shown = self._video.show(index)
        shown.write(out_3HW, geometry)
        damaged = shown.damaged is not None
        if keep:
            self._kept[index, geometry] = out_3HW.copy(), damaged
        return damaged

    def forget_before(self, index: int) -> None:
        """Drops kept frames before `index`."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] >= index}


def _cut(
    video: Video | Pictures, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of all clips, in order. A clip with a frame that cannot be decoded fails; the next clip goes on behind that frame."""
    scaled, rules = _ScaledFrames(video), request.rules
    step = len(rules.variants)
    fired = False
    for position in range(0, len(planned), step):
        plans = planned[position : position + step]
        variants = _Variants(plans, rules)
        shape = 3, variants.shared.height, variants.shared.width
        frames = _frames(plans[0], video.times_s, available, rules)
        next_clip = _first_frame(planned[position + step : position + step + 1], video.times_s, rules.fps)
        done = 0
        try:
            for start, stop in pairwise(_borders(len(frames), request)):
                shared_T3HW = np.empty((stop - start, *shape), dtype=np.uint8)
                damaged = 0
                for row, index in enumerate(frames[start:stop].tolist()):
                    damaged += scaled.write(index, shared_T3HW[row], variants.shared, keep=index >= next_clip)
                    done += 1
                if not fired:
                    kill_points.fire(request.drill, "in_decoder")
                    fired = True
                pts_s = tuple(video.times_s[frames[start:stop]].tolist())
                chunk = FrameChunk(
                    0, shared_T3HW, pts_s, video.info.color_matrix, start == 0, stop == len(frames), damaged
                )
                yield from variants.chunks(chunk, request)
        except BadDataError as error:
            for plan in plans:
                reject = Reject.from_error(error, request.video, "decode", clip=plan.index, frames_recovered=done)
                yield ClipFailed(plan.index, reject)
        scaled.forget_before(next_clip)


class _OpenClip:
    """A clip of which frames are being collected, one chunk at a time."""

    def __init__(
        self, video: Video | Pictures, plans: tuple[ClipPlan, ...], available: int, request: CutRequest
    ) -> None:
        self.plans = plans
        self.done = 0  # frames
        self._times_s, self._matrix = video.times_s, video.info.color_matrix
        self._variants = _Variants(plans, request.rules)
        self._frames = _frames(plans[0], video.times_s, available, request.rules)
        self._borders = iter(_borders(len(self._frames), request))
        self._start = self._stop = next(self._borders)
        self._planes_T3HW = np.empty(0, np.uint8)
        self._damaged = 0
        self._request = request

    @property
    def wants(self) -> int:
        """Index of its next frame; -1 if it has all."""
        return int(self._frames[self.done]) if self.done < len(self._frames) else -1

    def take(self, shown: Shown, scaled: dict[Geometry, np.ndarray]) -> Iterator[FrameChunk]:
        """Takes the frame that it `wants` as often as it is on screen; gives the chunks that are full. `scaled`: this frame in windows
        that other clips have asked for.
        """
        index, geometry = self.wants, self._variants.shared
        while self.wants == index:
            if self.done == self._stop:
                self._start, self._stop, self._damaged = self._stop, next(self._borders), 0
                self._planes_T3HW = np.empty((self._stop - self._start, 3, geometry.height, geometry.width), np.uint8)
            row_3HW = self._planes_T3HW[self.done - self._start]
            if geometry in scaled:
                row_3HW[:] = scaled[geometry]
            else:
                shown.write(row_3HW, geometry)
                scaled[geometry] = row_3HW
            self._damaged += shown.damaged is not None
            self.done += 1
            if self.done == self._stop:
                yield from self._chunks()

    def _chunks(self) -> Iterator[FrameChunk]:
        pts_s = tuple(self._times_s[self._frames[self._start : self._stop]].tolist())
        first, last = self._start == 0, self._stop == len(self._frames)
        shared = FrameChunk(0, self._planes_T3HW, pts_s, self._matrix, first, last, self._damaged)
        yield from self._variants.chunks(shared, self._request)


def _cut_together(
    video: Video | Pictures, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of clips that may overlap, in the order in which they are full: each frame is decoded once, and scaled once for each
    window. A frame that cannot be decoded fails the clips that show it.
    """
    step, fired = len(request.rules.variants), False
    groups = (planned[at : at + step] for at in range(0, len(planned), step))
    coming = (_OpenClip(video, plans, available, request) for plans in groups)
    following, open_clips = next(coming, None), list[_OpenClip]()
    while following is not None or open_clips:
        index = min(clip.wants for clip in (*open_clips, *([following] if following is not None else [])))
        while following is not None and following.wants == index:
            open_clips.append(following)
            following = next(coming, None)
        scaled: dict[Geometry, np.ndarray] = {}
        for clip in [clip for clip in open_clips if clip.wants == index]:
            try:
                for chunk in clip.take(video.show(index), scaled):
                    if not fired:
                        kill_points.fire(request.drill, "in_decoder")
                        fired = True
                    yield chunk
            except BadDataError as error:
                open_clips.remove(clip)
                for plan in clip.plans:
                    frames = clip.done
                    reject = Reject.from_error(error, request.video, "decode", clip=plan.index, frames_recovered=frames)
                    yield ClipFailed(plan.index, reject)
        open_clips = [clip for clip in open_clips if clip.wants >= 0]


def _first_frame(later: tuple[ClipPlan, ...], times_s: np.ndarray, fps: float | None) -> int:
    """First frame of the next clip; the number of frames if there is none."""
    if not later:
        return len(times_s)
    return int(clips.frames_on_screen(times_s, later[0].start, later[0].start + 1, fps)[0])

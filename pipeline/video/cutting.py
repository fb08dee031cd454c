"""Cuts the clips of one video: the composition of decode and clips that runs inside a decoder process.

Enters: `CutRequest`. Leaves, one per call: `OpenedVideo`, then `FrameChunk`s and `ClipFailed`s in clip order, then
`VideoEnded`. One sequential pass over the stream; frames that later clips share are kept scaled, never more than one
clip's worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pipeline.config import DecodeConfig, DrillConfig
from pipeline.errors import BadDataError, PolicyReject
from pipeline.process import kill_points as drill
from pipeline.records import ClipFailed, ClipPlan, ClipRules, EncodedVideo, FrameChunk, OpenedVideo, Reject, VideoEnded
from pipeline.video import clips
from pipeline.video.decode import Shown, Video, open_video
from pipeline.video.decode.planes import Geometry

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CutRequest:
    """What a decoder is asked: a video, the rules, the limits. `chunk_frames` 0: each clip comes as a single chunk. `etag`: of the
    object that the sample came from, where known.
    """

    sample: EncodedVideo
    rules: ClipRules
    limits: DecodeConfig
    chunk_frames: int
    drill: DrillConfig
    etag: str | None = None
    headers_only: bool = False  # a decoder process closes the video once it is open; nothing is cut


class Cutter:
    """Answers `open` once, then `next` until it returns `VideoEnded` (and `VideoEnded` again from there on)."""

    def __init__(self, request: CutRequest) -> None:
        """Does nothing yet: `open` does."""
        self._request = request
        self._video: Video | None = None
        self._answers: Iterator[FrameChunk | ClipFailed] = iter(())
        self._cpu_s = 0.0
        self._frames_decoded = 0

    def open(self) -> OpenedVideo:
        """Opens the video and plans its clips.

        Raises:
            DamagedInput: see `decode.open_video`.
            PolicyReject: see `decode.open_video`.
            StorageUnavailable, SourceChanged, SourceRefused: the file below cannot be read, here and in `next`.
        """
        return self._timed(self._open)

    def next(self) -> FrameChunk | ClipFailed | VideoEnded:
        """The next chunk, the next clip that fails, or the end."""
        answer = self._timed(lambda: next(self._answers, None))
        if answer is not None:
            return answer
        self.close()
        return VideoEnded(self._frames_decoded, self._cpu_s)

    def close(self) -> None:
        """Releases the video; safe to call twice."""
        self._answers = iter(())
        if self._video is not None:
            self._frames_decoded = self._video.frames_decoded
            self._video.close()
            self._video = None

    def _timed(self, work: Callable[[], Result]) -> Result:
        # Decoding is single-threaded, so this thread's CPU time is all of it.
        started = time.thread_time()
        try:
            return work()
        finally:
            self._cpu_s += time.thread_time() - started

    def _open(self) -> OpenedVideo:
        sample, rules = self._request.sample, self._request.rules
        self._video = video = open_video(sample.video, self._request.limits)
        planned, rejects = clips.plan(video.info, video.times_s, video.end_s, rules, key=sample.key, uri=sample.uri)
        available = clips.grid_length(len(video.times_s), video.end_s, rules.fps)
        info = video.info
        if tail := clips.uncovered_tail(planned, available, rules):
            info = replace(info, warnings=(*info.warnings, f"tail_frames:{tail}"))
        if rules.select == "uniform" and 0 < len(planned) < rules.select_arg:
            info = replace(info, warnings=(*info.warnings, f"uniform_clips:{len(planned)}/{rules.select_arg}"))
        if damage := video.incomplete:
            # What is there can be cut, but a clip of the whole video it is not.
            planned = () if rules.select == "whole" else planned
            found = video.info.num_frames
            rejects = (
                *rejects,
                Reject(sample.key, "decode", "truncated", damage, False, uri=sample.uri, frames_recovered=found),
            )
        if planned:
            self._answers = _cut(video, planned, available, self._request)
        return OpenedVideo(info, planned, rejects)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A planned clip with the frame of each of its positions and its chunk borders."""

    plan: ClipPlan
    frames: np.ndarray  # int64, frame index on screen at each position
    borders: tuple[int, ...]

    @property
    def geometry(self) -> Geometry:
        plan = self.plan
        size = plan.bucket.height, plan.bucket.width
        return Geometry(plan.scaled_height, plan.scaled_width, plan.crop_top, plan.crop_left, *size)


def _prepare(plan: ClipPlan, times_s: np.ndarray, available: int, request: CutRequest) -> _Cut:
    rules = request.rules
    count = plan.bucket.frames or clips.whole_frames(available - plan.start, rules.time_stride, rules.lead_frames)
    frames = clips.frames_on_screen(times_s, plan.start, plan.start + count, rules.fps)
    if request.chunk_frames:
        step = max(rules.time_stride, request.chunk_frames // rules.time_stride * rules.time_stride)
        borders = (0, *range(min(count, rules.lead_frames + step), count, step), count)
    else:
        borders = (0, count)
    return _Cut(plan, frames, borders)


class _Roll:
    """The one pass over the stream: frames in the order the clips need them, and those kept for a later, overlapping
    clip.
    """

    def __init__(self, video: Video) -> None:
        self._video = video
        self._index = -1
        self._current: Shown | None = None
        self._kept: dict[tuple[int, Geometry], tuple[np.ndarray, bool]] = {}

    def write(self, index: int, geometry: Geometry, out_3HW: np.ndarray, keep: bool) -> bool:
        """Fills `out_3HW` with what is on screen at frame `index`; keeps a copy if a later clip will want it. Whether it is damaged."""
        kept = self._kept.get((index, geometry))
        if kept is not None:
            out_3HW[:], damaged = kept
            return damaged
        if index != self._index or self._current is None:
            self._current = None
            self._current, self._index = self._video.show(index), index
        self._current.write(out_3HW, geometry)
        damaged = self._current.damaged is not None
        if keep:
            self._kept[index, geometry] = out_3HW.copy(), damaged
        return damaged

    def forget_before(self, index: int) -> None:
        """Drops kept frames that no later clip wants."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] >= index}


def _cut(
    video: Video, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of all clips, in order. A clip with a frame that cannot be had fails; the next one goes on behind it."""
    roll = _Roll(video)
    fired = False
    for position, plan in enumerate(planned):
        cut = _prepare(plan, video.times_s, available, request)
        wanted_later = _first_frame(planned[position + 1 : position + 2], video.times_s, request.rules.fps)
        done = 0
        try:
            for start, stop in pairwise(cut.borders):
                planes_T3HW = np.empty((stop - start, 3, plan.bucket.height, plan.bucket.width), dtype=np.uint8)
                damaged = 0
                for row, index in enumerate(cut.frames[start:stop].tolist()):
                    damaged += roll.write(index, cut.geometry, planes_T3HW[row], keep=index >= wanted_later)
                    done += 1
                if not fired:
                    drill.fire(request.drill, "in_decoder")
                    fired = True
                pts_s = tuple(video.times_s[cut.frames[start:stop]].tolist())
                last = stop == len(cut.frames)
                matrix = video.info.color_matrix
                yield FrameChunk(plan.index, planes_T3HW, pts_s, matrix, first=start == 0, last=last, damaged=damaged)
        except BadDataError as error:
            yield _failed(plan, error, done, request.sample)
        roll.forget_before(wanted_later)


def _first_frame(later: tuple[ClipPlan, ...], times_s: np.ndarray, fps: float | None) -> int:
    """First frame of the next clip; beyond every frame when there is none."""
    if not later:
        return len(times_s)
    return int(clips.frames_on_screen(times_s, later[0].start, later[0].start + 1, fps)[0])


def _failed(plan: ClipPlan, error: BadDataError, done: int, sample: EncodedVideo) -> ClipFailed:
    policy = isinstance(error, PolicyReject)
    return ClipFailed(
        plan.index,
        Reject(
            sample.key,
            "decode",
            error.reason,
            error.message,
            policy,
            uri=sample.uri,
            clip=plan.index,
            frames_recovered=done,
        ),
    )

"""Cutter of the clips of one video, run inside a decoder process.

Takes a `CutRequest`; returns an `OpenedVideo`, then one `FrameChunk` or `ClipFailed` per call in clip order, then `VideoEnded`. It reads
the stream once. Scaled frames that the next clip shares are kept, at most one clip of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pipeline.config import DecodeConfig, DrillConfig
from pipeline.errors import BadDataError
from pipeline.process import kill_points
from pipeline.records import ClipFailed, ClipPlan, ClipRules, EncodedVideo, FrameChunk, OpenedVideo, Reject, VideoEnded
from pipeline.video import clips
from pipeline.video.decode import Video, open_video
from pipeline.video.decode.planes import Geometry

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


class Cutter:
    """Cutting of one video: `open` once, then `next` until it returns `VideoEnded`; it returns that again if called once more."""

    def __init__(self, request: CutRequest) -> None:
        """Opens nothing; `open` does."""
        self._request = request
        self._video: Video | None = None
        self._answers: Iterator[FrameChunk | ClipFailed] = iter(())
        self._cpu_s = 0.0
        self._frames_decoded = 0

    def open(self) -> OpenedVideo:
        """Opens the video and chooses its clips.

        Raises:
            DamagedInput, PolicyReject: see `decode.open_video`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read, here and in `next`.
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
        # Decoding is single-threaded: its CPU time is this thread's.
        started = time.thread_time()
        try:
            return work()
        finally:
            self._cpu_s += time.thread_time() - started

    def _open(self) -> OpenedVideo:
        encoded, rules = self._request.video, self._request.rules
        self._video = video = open_video(encoded.video, self._request.limits)
        info, key, uri = video.info, encoded.key, encoded.uri
        planned, rejects = clips.choose_clips(info, video.times_s, video.end_s, rules, key=key, uri=uri)
        available = clips.grid_length(len(video.times_s), video.end_s, rules.fps)
        if tail := clips.uncovered_tail(planned, available, rules):
            info = replace(info, warnings=(*info.warnings, f"tail_frames:{tail}"))
        if rules.select == "uniform" and 0 < len(planned) < rules.select_arg:
            info = replace(info, warnings=(*info.warnings, f"uniform_clips:{len(planned)}/{rules.select_arg}"))
        if damage := video.incomplete:
            # Clips can be cut from the frames that are there, but not one of the whole video.
            planned = () if rules.select == "whole" else planned
            found = info.num_frames
            rejects = (*rejects, Reject(key, "decode", "truncated", damage, False, uri=uri, frames_recovered=found))
        if planned:
            self._answers = _cut(video, planned, available, self._request)
        return OpenedVideo(info, planned, rejects)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A planned clip with the frame index of each position and the borders of its chunks."""

    plan: ClipPlan
    frames: np.ndarray = field(repr=False)  # int64, index of the frame on screen at each position
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
        step = clips.chunk_length(request.chunk_frames, rules.time_stride)
        borders = (0, *range(min(count, rules.lead_frames + step), count, step), count)
    else:
        borders = (0, count)
    return _Cut(plan, frames, borders)


class _ScaledFrames:
    """Scaled frames of a video, asked for in ascending order but for those that were kept for an overlapping clip."""

    def __init__(self, video: Video) -> None:
        self._video = video
        self._kept: dict[tuple[int, Geometry], tuple[np.ndarray, bool]] = {}

    def write(self, index: int, geometry: Geometry, out_3HW: np.ndarray, keep: bool) -> bool:
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
    video: Video, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of all clips, in order. A clip with a frame that cannot be decoded fails; the next clip goes on behind that frame."""
    scaled = _ScaledFrames(video)
    fired = False
    for position, plan in enumerate(planned):
        cut = _prepare(plan, video.times_s, available, request)
        next_clip = _first_frame(planned[position + 1 : position + 2], video.times_s, request.rules.fps)
        done = 0
        try:
            for start, stop in pairwise(cut.borders):
                planes_T3HW = np.empty((stop - start, 3, plan.bucket.height, plan.bucket.width), dtype=np.uint8)
                damaged = 0
                for row, index in enumerate(cut.frames[start:stop].tolist()):
                    damaged += scaled.write(index, cut.geometry, planes_T3HW[row], keep=index >= next_clip)
                    done += 1
                if not fired:
                    kill_points.fire(request.drill, "in_decoder")
                    fired = True
                pts_s = tuple(video.times_s[cut.frames[start:stop]].tolist())
                last = stop == len(cut.frames)
                matrix = video.info.color_matrix
                yield FrameChunk(plan.index, planes_T3HW, pts_s, matrix, first=start == 0, last=last, damaged=damaged)
        except BadDataError as error:
            reject = Reject.from_error(error, request.video, "decode", clip=plan.index, frames_recovered=done)
            yield ClipFailed(plan.index, reject)
        scaled.forget_before(next_clip)


def _first_frame(later: tuple[ClipPlan, ...], times_s: np.ndarray, fps: float | None) -> int:
    """First frame of the next clip; the number of frames if there is none."""
    if not later:
        return len(times_s)
    return int(clips.frames_on_screen(times_s, later[0].start, later[0].start + 1, fps)[0])

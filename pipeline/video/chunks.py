"""Chunks of the clips of an open video and its paired videos, in one pass: frames are decoded and scaled once for all variants."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadDataError
from pipeline.process import kill_points
from pipeline.records import ClipFailed, ClipPlan, ClipRules, FrameChunk, Reject, is_mask
from pipeline.video import clips
from pipeline.video.decode.planes import Geometry
from pipeline.video.first_frame import lossless_image
from pipeline.video.members import averaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.video.cutting import CutRequest
    from pipeline.video.decode import Shown, Video
    from pipeline.video.images import Pictures
    from pipeline.video.members import Members


def frames_of_plan(plan: ClipPlan, times_s: np.ndarray, available: int, rules: ClipRules) -> np.ndarray:
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
        self.shared = Geometry(first.scaled_height, first.scaled_width, *self._at, *size, enlarge=rules.upscale)
        self._of_masks = replace(self.shared, enlarge=True)

    def geometry(self, track: str) -> Geometry:
        """The window that all variants share, for a track. Masks may be enlarged."""
        return self._of_masks if is_mask(track) else self.shared

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


class _ScaledFrames:
    """Scaled frames of a video, asked for in ascending order but for those that were kept for an overlapping clip."""

    def __init__(self, show: Callable[[int], Shown]) -> None:
        self._show = show
        self._kept: dict[tuple[int, Geometry], tuple[np.ndarray, bool]] = {}

    def write(self, index: int, out_3HW: np.ndarray, geometry: Geometry, *, keep: bool) -> bool:
        """Fills `out_3HW` with the frame at `index` and keeps a copy if `keep`. Returns whether the frame is damaged."""
        kept = self._kept.get((index, geometry))
        if kept is not None:
            out_3HW[:], damaged = kept
            return damaged
        shown = self._show(index)
        shown.write(out_3HW, geometry)
        damaged = shown.damaged is not None
        if keep:
            self._kept[index, geometry] = out_3HW.copy(), damaged
        return damaged

    def forget_before(self, index: int) -> None:
        """Drops kept frames before `index`."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] >= index}


def cut(
    video: Video | Pictures, members: Members | None, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of all clips, in order. A clip with a frame that cannot be decoded fails; the next clip goes on behind that frame."""
    rules = request.rules
    tracks = {name: _ScaledFrames(show) for name, show in _tracks(video, members).items()}
    step = len(rules.variants)
    fired = False
    for position in range(0, len(planned), step):
        plans = planned[position : position + step]
        variants = _Variants(plans, rules)
        frames = frames_of_plan(plans[0], video.times_s, available, rules)
        next_clip = _first_frame(planned[position + step : position + step + 1], video.times_s, rules.fps)
        done = 0
        try:
            for start, stop in pairwise(_borders(len(frames), request)):
                piece = _Piece(tracks, variants, stop - start)
                for row, index in enumerate(frames[start:stop].tolist()):
                    for name, scaled in tracks.items():
                        out_3HW = piece.planes[name][row]
                        geometry = variants.geometry(name)
                        piece.damaged[name] += scaled.write(index, out_3HW, geometry, keep=index >= next_clip)
                    done += 1
                if not fired:
                    kill_points.fire(request.drill, "in_decoder")
                    fired = True
                pts_s = tuple(video.times_s[frames[start:stop]].tolist())
                matrices = _matrices(video, members)
                yield from piece.chunks(variants, matrices, pts_s, request, first=start == 0, last=stop == len(frames))
        except BadDataError as error:
            for plan in plans:
                reject = Reject.from_error(error, request.video, "decode", clip=plan.index, frames_recovered=done)
                yield ClipFailed(plan.index, reject)
        for scaled in tracks.values():
            scaled.forget_before(next_clip)


def _tracks(video: Video | Pictures, members: Members | None) -> dict[str, Callable[[int], Shown]]:
    """What shows the frames of the main video, named "", and of each paired video."""
    tracks: dict[str, Callable[[int], Shown]] = {"": video.show}
    if members is not None:
        tracks |= {name: partial(members.show, name) for name in members.videos}
    return tracks


def _matrices(video: Video | Pictures, members: Members | None) -> dict[str, str]:
    others = {} if members is None else members.videos
    return {"": video.info.color_matrix} | {name: other.info.color_matrix for name, other in others.items()}


class _Piece:
    """Frames of a clip between two borders: by track, uint8 `(T, 3, H, W)` of the window that all variants share, and how many are
    damaged.
    """

    def __init__(self, tracks: Iterable[str], variants: _Variants, frames: int) -> None:
        shape = frames, 3, variants.shared.height, variants.shared.width
        self.planes = {name: np.empty(shape, np.uint8) for name in tracks}
        self.damaged = dict.fromkeys(self.planes, 0)

    def chunks(
        self,
        variants: _Variants,
        matrices: dict[str, str],
        pts_s: tuple[float, ...],
        request: CutRequest,
        *,
        first: bool,
        last: bool,
    ) -> Iterator[FrameChunk]:
        """The chunk of each variant, then of the same variants of each paired video. Masks go with the first ones."""
        masks: dict[int, dict[str, np.ndarray]] = {}
        for name in filter(is_mask, self.planes):
            for plan, planes_T3HW in variants.of(self.planes[name]):
                values = averaged(planes_T3HW[:, 0], request.rules, first=first)
                masks.setdefault(plan.index, {})[name] = values
        damaged = self.damaged[""] + sum(self.damaged[name] for name in self.planes if is_mask(name))
        for name in (name for name in self.planes if not is_mask(name)):
            main, matrix = not name, matrices[name]
            for plan, planes_T3HW in variants.of(self.planes[name]):
                stored = main and first and request.first_frame
                image = lossless_image(planes_T3HW[0], matrix) if stored else None
                count = damaged if main else self.damaged[name]
                mine = masks.get(plan.index, {}) if main else {}
                yield FrameChunk(
                    plan.index, planes_T3HW, pts_s, matrix, first, last, count, image, member=name, masks=mine
                )


class _OpenClip:
    """A clip of which frames are being collected, one chunk at a time."""

    def __init__(
        self,
        video: Video | Pictures,
        matrices: dict[str, str],
        plans: tuple[ClipPlan, ...],
        available: int,
        request: CutRequest,
    ) -> None:
        """`matrices`: colour matrix of each track."""
        self.plans = plans
        self.done = 0  # frames
        self._times_s, self._matrices, self._request = video.times_s, matrices, request
        self._variants = _Variants(plans, request.rules)
        self._frames = frames_of_plan(plans[0], video.times_s, available, request.rules)
        self._borders = iter(_borders(len(self._frames), request))
        self._start = self._stop = next(self._borders)
        self._piece = _Piece((), self._variants, 0)

    @property
    def wants(self) -> int:
        """Index of its next frame; -1 if it has all."""
        return int(self._frames[self.done]) if self.done < len(self._frames) else -1

    def take(self, shown: dict[str, Shown], scaled: dict[tuple[str, Geometry], np.ndarray]) -> Iterator[FrameChunk]:
        """Takes the frame that it `wants`, of each track, as often as it is on screen; gives the chunks that are full. `scaled`: this frame
        in windows that other clips have asked for.
        """
        index = self.wants
        while self.wants == index:
            if self.done == self._stop:
                self._start, self._stop = self._stop, next(self._borders)
                self._piece = _Piece(shown, self._variants, self._stop - self._start)
            for name, frame in shown.items():
                row_3HW, geometry = self._piece.planes[name][self.done - self._start], self._variants.geometry(name)
                if (name, geometry) in scaled:
                    row_3HW[:] = scaled[name, geometry]
                else:
                    frame.write(row_3HW, geometry)
                    scaled[name, geometry] = row_3HW
                self._piece.damaged[name] += frame.damaged is not None
            self.done += 1
            if self.done == self._stop:
                yield from self._chunks()

    def _chunks(self) -> Iterator[FrameChunk]:
        pts_s = tuple(self._times_s[self._frames[self._start : self._stop]].tolist())
        first, last = self._start == 0, self._stop == len(self._frames)
        yield from self._piece.chunks(self._variants, self._matrices, pts_s, self._request, first=first, last=last)


def cut_together(
    video: Video | Pictures, members: Members | None, planned: tuple[ClipPlan, ...], available: int, request: CutRequest
) -> Iterator[FrameChunk | ClipFailed]:
    """All chunks of clips that may overlap, in the order in which they are full: each frame is decoded once, and scaled once for each
    window. A frame that cannot be decoded fails the clips that show it.
    """
    step, fired = len(request.rules.variants), False
    groups = (planned[at : at + step] for at in range(0, len(planned), step))
    tracks, matrices = _tracks(video, members), _matrices(video, members)
    coming = (_OpenClip(video, matrices, plans, available, request) for plans in groups)
    following, open_clips = next(coming, None), list[_OpenClip]()
    while following is not None or open_clips:
        index = min(clip.wants for clip in (*open_clips, *([following] if following is not None else [])))
        while following is not None and following.wants == index:
            open_clips.append(following)
            following = next(coming, None)
        scaled: dict[tuple[str, Geometry], np.ndarray] = {}
        for clip in [clip for clip in open_clips if clip.wants == index]:
            try:
                shown = {name: show(index) for name, show in tracks.items()}
                for chunk in clip.take(shown, scaled):
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

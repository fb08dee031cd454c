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
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.config import DecodeConfig, DrillConfig
from pipeline.errors import BadDataError
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
from pipeline.video import chunks, clips, spans
from pipeline.video.black_bars import BlackBars
from pipeline.video.decode import Video, open_again
from pipeline.video.images import Pictures, open_media
from pipeline.video.members import Members

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
        self._members: Members | None = None
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
        self._close_main()
        if self._members is not None:
            self._frames_decoded += self._members.frames_decoded
            self._members.close()
            self._members = None

    def _close_main(self) -> None:
        if self._video is not None:
            self._frames_decoded += self._video.frames_decoded
            self._video.close()
            self._video = None

    def _timed(self, work: Callable[[], Result]) -> Result:
        # Decoding is single-threaded: its CPU time is this thread's.
        started = time.thread_time()
        try:
            return work()
        except BadDataError as error:
            if not error.video and self._video is not None:
                error.video = self._video.info.counted()
            raise
        finally:
            self._cpu_s += time.thread_time() - started

    def _open(self) -> OpenedVideo | StillOpening:
        rules = self._request.rules
        self._video = video = open_media(self._request.video, self._request.limits, rules.images)
        if video.info.is_image:
            self._request = replace(self._request, rules=rules.of_images())
        if self._request.video.members:
            self._members = Members(self._request.video, self._request.limits, video)
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
        frames = [chunks.frames_of_plan(plan, video.times_s, available, rules) for plan in planned]
        bars = BlackBars(np.unique(np.concatenate(frames)), video.info.height, video.info.width)
        for _ in bars.look(video):
            yield StillOpening()

        def inside(start: int, stop: int) -> Window | None:
            if rules.select == "slide":  # clips that share scaled frames must have the same bars
                return bars.inside()
            return bars.inside(clips.frames_on_screen(video.times_s, start, stop, rules.fps))

        again, rejects = self._choose(video, inside)
        if isinstance(video, Video):
            self._close_main()
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
        if self._members is not None:
            self._members.check_sizes(planned, rules)
        cut = chunks.cut_together if rules.spans else chunks.cut
        self._answers = cut(video, self._members, planned, available, self._request) if planned else iter(())
        return OpenedVideo(info, planned, rejects)

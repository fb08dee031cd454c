"""Frames of a file as Lathe decodes them: all in order, or in clips of a rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.errors import BadDataError
from pipeline.records import ClipFailed, ClipRules, OpenedVideo, Reject, Sample, VideoEnded, VideoInfo
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import open_video
from pipeline.video.decode.planes import Geometry

LIMITS = validate(DecodeConfig, {"timeout_s": 20, "max_pixels": 1 << 20})
RULES = {
    "head": {"select": "head"},
    "tile": {"select": "tile"},
    "slide": {"select": "slide:3"},
    "every": {"select": "slide:1"},
    "sparse": {"select": "slide:41"},
    "uniform": {"select": "uniform:3"},
    "whole": {"select": "whole"},
    "tile at 10 fps": {"select": "tile", "fps": 10, "min_fps_ratio": 0},
    "uniform at 7 fps": {"select": "uniform:2", "fps": 7, "min_fps_ratio": 0},
}


def rules(name: str = "tile", size: str = "64x96", frames: int = 5) -> ClipRules:
    """A clip rule of `RULES`, by default at the size of the numbered videos."""
    clips = validate(ClipConfig, {"frames": frames, "size": size, "upscale": True, **RULES[name]})
    return resolve_rules(clips, 4, 8, "test")


class Through(NamedTuple):
    """A video read from its first shown frame to its last."""

    info: VideoInfo
    times_s: np.ndarray
    end_s: float
    planes: list[np.ndarray]  # (3, H, W) uint8 each; fewer than times where the stream breaks
    error: BadDataError | None


def read_through(data: bytes | str, size: tuple[int, int] | None = None) -> Through:
    """All frames, scaled to `size` (height, width; default: as shown). Raises as `open_video`."""
    video = open_video(data, LIMITS)
    try:
        height, width = size or (video.info.height, video.info.width)
        geometry = Geometry(height, width, 0, 0, height, width)
        planes: list[np.ndarray] = []
        error = None
        try:
            for shown in map(video.show, range(video.info.num_frames)):
                planes.append(np.empty((3, height, width), np.uint8))
                shown.write(planes[-1], geometry)
        except BadDataError as caught:
            error = caught
        return Through(video.info, video.times_s, video.end_s, planes, error)
    finally:
        video.close()


class Cut(NamedTuple):
    """The clips of a video by one rule."""

    opened: OpenedVideo
    clips: dict[int, list[tuple[float, np.ndarray]]]  # time and planes of each frame, by clip; failed ones are missing
    failed: list[Reject]


def cut(data: bytes | str, clip_rules: ClipRules, chunk_frames: int = 8) -> Cut:
    """Cuts a video inside this process. Raises as `Cutter.open`."""
    cutter = Cutter(
        CutRequest(Sample("key", 0, "uri", data, "mp4"), clip_rules, LIMITS, chunk_frames, validate(DrillConfig, {}))
    )
    try:
        opened = cutter.open()
        clips: dict[int, list[tuple[float, np.ndarray]]] = {}
        failed = []
        while not isinstance(answer := cutter.next(), VideoEnded):
            if isinstance(answer, ClipFailed):
                failed.append(answer.reject)
                clips.pop(answer.clip, None)
            else:
                clips.setdefault(answer.clip, []).extend(zip(answer.pts_s, answer.planes_T3HW, strict=True))
        assert set(clips) | {reject.clip for reject in failed} == {plan.index for plan in opened.clips}
        return Cut(opened, clips, failed)
    finally:
        cutter.close()

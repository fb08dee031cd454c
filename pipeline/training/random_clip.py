"""Random clip of one video, decoded as for encoding.

Takes an encoded video, a size and a random generator; returns uint8 RGB of that size. Frames on screen, colours, orientation and
scaling are those of the pipeline's decoder and of the network's input; only moment, scale and position are random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from model.colour import yuv_to_video
from pipeline.errors import PolicyReject
from pipeline.records import Bucket, ClipRules
from pipeline.video import clips
from pipeline.video.decode import open_video
from pipeline.video.decode.planes import Geometry

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.records import VideoInfo
    from pipeline.training.job import RandomClipConfig
    from pipeline.video.decode import Video


def random_clip(
    video: bytes | str, limits: DecodeConfig, config: RandomClipConfig, size: Bucket, draw: np.random.Generator
) -> torch.Tensor:
    """Random clip as uint8 RGB `3 T H W` of `size`, black 0, white 255: the encoder's RGB, rounded to 256 values.

    Args:
        video: encoded bytes, or a local path.
        limits: of decoding; `timeout_s` and `memory_bytes` apply to decoder processes that can be killed, so not here.
        config: ranges of what is drawn.
        size: of the clip.
        draw: generator for the first frame, the scale and the position, in this order.

    Raises:
        PolicyReject: `too_short`, `too_small`, `fps_too_low`, and those of `decode.open_video`.
        DamagedInput: as `decode.open_video` and `Video.planes`.
    """
    opened = open_video(video, limits)
    try:
        fps = None if config.fps == "source" else float(config.fps)
        _check(opened, config, fps, size)
        latest = clips.grid_length(len(opened.times_s), opened.end_s, fps) - size.frames
        start = int(draw.integers(latest + 1))
        wanted = clips.frames_on_screen(opened.times_s, start, start + size.frames, fps)
        geometry = _geometry(opened.info, config, size, draw)
        planes_T3HW = opened.planes(wanted, geometry)
        matrix = opened.info.color_matrix
    finally:
        opened.close()
    rgb_1CTHW = yuv_to_video(torch.from_numpy(planes_T3HW)[None], [matrix], value_range=(0.0, 255.0))
    return rgb_1CTHW[0].round_().to(torch.uint8)


def _check(video: Video, config: RandomClipConfig, fps: float | None, size: Bucket) -> None:
    """Raises PolicyReject if the video has no such clip, by the rules for encoding."""
    info = video.info
    if min(info.height, info.width) < config.min_side:
        raise PolicyReject("too_small", f"{info.height}x{info.width} pixels, data.clips.min_side is {config.min_side}")
    rules = ClipRules(
        select="head",
        select_arg=0,
        fps=fps,
        frame_counts=(size.frames,),
        buckets=(size,),
        area=None,
        multiple_of=1,
        upscale=config.upscale,
        min_fps_ratio=config.min_fps_ratio if size.frames > 1 else 0.0,
        time_stride=1,
        space_stride=1,
        lead_frames=1,
    )
    _, rejects = clips.choose_clips(info, video.times_s, video.end_s, rules)
    if rejects:
        raise PolicyReject(rejects[0].reason, rejects[0].message.replace("clips.", "data.clips."))


def _geometry(info: VideoInfo, config: RandomClipConfig, size: Bucket, draw: np.random.Generator) -> Geometry:
    """Random geometry: scaled to cover the clip times a log-uniform factor, not beyond the video's own size; then a random position."""
    cover = max(size.height / info.height, size.width / info.width)
    smallest, largest = np.log(config.scale)
    factor = min(float(np.exp(draw.uniform(smallest, largest))), max(1.0, 1 / cover))
    height = max(size.height, round(info.height * cover * factor))
    width = max(size.width, round(info.width * cover * factor))
    top, left = int(draw.integers(height - size.height + 1)), int(draw.integers(width - size.width + 1))
    return Geometry(height, width, top, left, size.height, size.width, enlarge=config.upscale)

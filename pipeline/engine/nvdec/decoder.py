"""NVDEC through libav: pictures of H.264, HEVC and VP9 decoded to NV12 frames in the memory of a GPU.

`Nvdec` is what `pipeline.video.decode.hardware` asks for. `started` checks it on this machine, before the first video.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel

from pipeline.config import DecodeConfig
from pipeline.engine.nvdec.scaler import DeviceScaler, chroma_position, same_pixels
from pipeline.errors import LatheError, WorkerLost
from pipeline.sample_corpus import X264, Recipe, encode_recipe
from pipeline.video.decode import hardware, open_video
from pipeline.video.decode.container import LIBAV_ERRORS, error_text
from pipeline.video.decode.frame_stream import FrameStream
from pipeline.video.decode.planes import Geometry

if TYPE_CHECKING:
    from pipeline.video.decode.orientation import Orientation
    from pipeline.video.decode.packet_table import PacketTable

PROBE = Recipe("clouds", "", "mp4", "libx264", 192, 320, 30, 0.3, X264)
PROBE_GEOMETRY = Geometry(81, 135, 0, 0, 81, 135)


class Nvdec:
    """The decoder of the first GPU that this process sees."""

    device = "cuda"

    def __init__(self) -> None:
        # Frames stay on the GPU. libav and torch share its primary context, in which alone their pointers are valid.
        self._hwaccel = HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True)
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False  # `DeviceScaler` needs exact products

    def open_alone(self, data: bytes) -> None:
        """Decodes one frame of `data` without `FrameStream`, whose errors say less. Raises libav's errors, or RuntimeError.

        Called first: libav refuses a context that torch has made with other flags ("already active with incompatible flags").
        """
        with av.open(io.BytesIO(data), hwaccel=self._hwaccel) as container:
            frame = next(container.decode(video=0))
            if not self.takes(frame):
                raise RuntimeError(f"a frame came as {frame.format.name}, expected NV12 on the GPU")
            torch.zeros(1, device=self.device)  # while libav holds the context

    def stream(self, video: bytes | str, limits: DecodeConfig, table: PacketTable) -> FrameStream:
        """Frames of `video`, decoded by NVDEC. Raises as `FrameStream`."""
        return FrameStream(video, limits, table, hwaccel=self._hwaccel)

    def scaler(self, orientation: Orientation, first: Any) -> DeviceScaler | None:
        """Scaler for frames of `stream`. `first`: libav's first frame. None if its chroma lies at an unknown place."""
        position = chroma_position(first)
        return None if position is None else DeviceScaler(orientation, position, self.device)

    def same_pixels(self, first: Any, frame: Any) -> bool:
        """Whether a frame of `stream` has the samples of libav's frame `first`. Raises WorkerLost if the GPU fails."""
        return same_pixels(first, frame, self.device)

    def takes(self, frame: Any) -> bool:
        """Whether a frame is in the memory of the GPU, as NV12."""
        return bool(frame.format.name == "cuda" and frame.sw_format is not None and frame.sw_format.name == "nv12")


def start(decoder: Nvdec) -> None:
    """Installs `decoder` in this process, after decoding a small video with it and comparing every frame with libav's own.

    Raises:
        WorkerLost: NVDEC cannot be used here, or gives other pixels.
    """
    data = encode_recipe(PROBE, seed=0)
    try:
        for _ in range(2):  # before torch has a context on the GPU, and with it
            decoder.open_alone(data)
        hardware.install(decoder)
        ours, theirs = (_planes(data, device) for device in ("cuda", "cpu"))
    except LatheError as error:
        raise _unusable(error.message) from None
    except LIBAV_ERRORS as error:
        raise _unusable(f"{type(error).__name__}: {error_text(error)}") from error
    if not np.array_equal(ours, theirs):
        differ = int((ours != theirs).sum())
        raise _unusable(f"{differ} of {theirs.size} samples of a test video differ from those decoded on the CPU")


def _planes(data: bytes, device: str) -> np.ndarray:
    video = open_video(data, DecodeConfig.model_validate({"device": device, "nvdec_min_pixels": 0}))
    try:
        if device == "cuda" and video.info.warnings[-1] != "nvdec":
            raise RuntimeError(f"a test video was not decoded by NVDEC ({video.info.warnings[-1]})")
        return video.planes(np.arange(len(video.times_s)), PROBE_GEOMETRY)
    finally:
        video.close()


def _unusable(why: str) -> WorkerLost:
    message = f"NVDEC cannot be used on this machine: {why}; set decode.device=cpu, or see docs/nvdec.md"
    return WorkerLost(message, blame=True, stage="decode")

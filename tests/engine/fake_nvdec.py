"""NVDEC without a GPU, for tests: libav decodes, and each frame is handed on as NV12 in host memory, as NVDEC has it on the GPU.

Everything else is the real code: rules, comparison of the first frame, scaling by torch, the program of a decoder process:
`python -m tests.engine.fake_nvdec` and its arguments. With FAKE_NVDEC=wrong in the environment it gives wrong pixels from frame 3 on.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from pipeline.engine.decoders.lane_process import serve
from pipeline.engine.nvdec import decoder
from pipeline.engine.nvdec.lanes import NvdecLanes
from pipeline.errors import DamagedInput
from pipeline.video.decode import hardware
from pipeline.video.decode.frame_stream import FrameStream


class FakeStream(FrameStream):
    """Frames of libav, each through `FakeNvdec.frame`."""

    def __init__(self, fake: FakeNvdec, *arguments: Any) -> None:
        self._fake = fake
        super().__init__(*arguments)

    def _decode(self, packet: Any) -> list[Any]:
        return [self._fake.frame(frame) for frame in super()._decode(packet)]


class FakeNvdec(decoder.Nvdec):
    """As `Nvdec`. `wrong_from`: after so many frames all have a wrong pixel; `refuses`: it opens no video."""

    device = "cpu"

    def __init__(self, *, wrong_from: int = 1 << 30, refuses: bool = False) -> None:
        super().__init__()
        self.wrong_from, self.refuses = wrong_from, refuses
        self.opened = self.frames = 0

    def stream(self, video: Any, limits: Any, table: Any) -> FrameStream:
        if self.refuses:
            raise DamagedInput("undecodable", "no free NVDEC", stage="decode")
        self.opened += 1
        return FakeStream(self, video, limits, table)

    def open_alone(self, data: bytes) -> None:
        pass

    def takes(self, frame: Any) -> bool:
        return frame.format.name == "nv12"

    def frame(self, frame: Any) -> Any:
        self.frames += 1
        if frame.format.name not in hardware.PIXEL_FORMATS or frame.width % 2 or frame.height % 2:
            return frame
        made = frame.reformat(format="nv12", threads=1)
        made.color_range = 2 if frame.format.name == "yuvj420p" else frame.color_range
        if self.frames > self.wrong_from:
            luma = np.frombuffer(made.planes[0], np.uint8).copy()
            luma[0] ^= 255
            made.planes[0].update(luma.tobytes())
        return made


class FakeLanes(NvdecLanes):
    program = "tests.engine.fake_nvdec"


if __name__ == "__main__":
    fake = FakeNvdec(wrong_from=3 if os.environ.get("FAKE_NVDEC") == "wrong" else 1 << 30)
    serve(*map(int, sys.argv[1:]), prepare=lambda: decoder.start(fake))

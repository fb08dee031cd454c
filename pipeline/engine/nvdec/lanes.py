"""`Lanes` as child processes that decode with NVDEC of the encoder's GPU."""

from __future__ import annotations

import os
import subprocess

from pipeline.engine.decoders.process_lanes import ProcessLanes, start_program

VISIBLE = "CUDA_VISIBLE_DEVICES"


class NvdecLanes(ProcessLanes):
    """As `ProcessLanes`; `device` is the encoder's, `cuda` or `cuda:N`, the only one that the processes see."""

    program = "pipeline.engine.nvdec.lane_process"

    def __init__(self, count: int, memory_bytes: int, device: str) -> None:
        self._visible = visible(device, os.environ.get(VISIBLE))
        super().__init__(count, memory_bytes)

    def _popen(self, pipe: int, shared: int) -> subprocess.Popen[bytes]:
        arguments = pipe, self._memory_bytes, self._niceness, os.getpid(), shared
        return start_program(self.program, arguments, (pipe, shared), {VISIBLE: self._visible})


def visible(device: str, seen: str | None) -> str:
    """Value of CUDA_VISIBLE_DEVICES with which a process sees only `device`. `seen`: its value in this process, if it is set."""
    number = int(device.partition(":")[2] or 0)
    return seen.split(",")[number] if seen else str(number)

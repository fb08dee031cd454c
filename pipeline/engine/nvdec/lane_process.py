"""Program of one decoder process that uses NVDEC, started by `NvdecLanes`; arguments as those of `decoders/lane_process`."""

from __future__ import annotations

import sys

from pipeline.engine.decoders.lane_process import serve
from pipeline.engine.nvdec.decoder import Nvdec, start

if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]), prepare=lambda: start(Nvdec()))

"""Section `nvdec`: rates of decoder processes with NVDEC by codec, frame size and number of processes; pixels compared with libav's.

A rehearsal on a CPU runs decoder processes without NVDEC. PyAV is needed; a machine without it has been given no wheels (`make wheels`).
"""

from __future__ import annotations

import io
import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine
    from pipeline.engine.decoders.process_lanes import ProcessLanes

# Name, encoder, height, width. The most informative first; 360p is below `decode.nvdec_min_pixels`, which this may correct.
VIDEOS = (
    ("h264 1080p", "libx264", 1080, 1920),
    ("h264 720p", "libx264", 720, 1280),
    ("hevc 1080p", "libx265", 1080, 1920),
    ("h264 360p", "libx264", 360, 640),
    ("vp9 720p", "libvpx-vp9", 720, 1280),
)
PROCESSES = (14, 7, 1)  # an H200 has seven engines
TICKETS = itertools.count(1)  # answers to pulls beyond the end of a video arrive in a later measurement
CLIP_FRAMES, MEASURED_S, READY_S = 17, 1.0, 120.0
NOISE = 24  # of 255
BITS_PER_PIXEL = 0.13  # 8 Mbit/s at 1080p with 30 frames/s
# Fast ones, on all cores: nothing else runs then.
ENCODING = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
}


def run(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `nvdec`."""
    videos = VIDEOS if machine.cuda else (("h264 tiny", "libx264", 64, 96),)
    counts = PROCESSES if machine.cuda else (1,)
    lanes: list[ProcessLanes] = []
    started = report.measure("start of the processes", lambda: start(lanes, max(counts), cuda=machine.cuda), again=True)
    try:
        for name, encoder, height, width in videos if started is not None else ():
            data: list[bytes] = []
            made = report.measure(
                f"{name}: make the video", lambda d=data, e=encoder, h=height, w=width: make(d, e, h, w), again=True
            )
            for processes in counts if made is not None else ():
                measured_s = MEASURED_S if machine.cuda else 0.0
                report.measure(
                    f"{name}: {processes} processes",
                    lambda d=data, n=processes, s=measured_s: rate(lanes[0], d[0], n, s, cuda=machine.cuda),
                )
            if made is not None and name == videos[0][0]:
                report.measure(
                    f"{name}: matrix products beside {counts[0]} processes",
                    lambda d=data: beside(lanes[0], d[0], counts[0], machine),
                )
    finally:
        for each in lanes:
            each.close()


def start(lanes: list[ProcessLanes], count: int, *, cuda: bool) -> dict[str, float]:
    """Starts decoder processes into `lanes`. Raises RuntimeError if one cannot use NVDEC, with its reason."""
    from pipeline.engine.decoders.lanes import LaneReady
    from pipeline.engine.decoders.process_lanes import ProcessLanes
    from pipeline.engine.nvdec.lanes import NvdecLanes

    began, ready = time.perf_counter(), 0
    lanes.append(NvdecLanes(count, 8 << 30, "cuda") if cuda else ProcessLanes(count, 4 << 30))
    while ready < count:
        for _, _, answer in lanes[0].wait(1.0):
            if not isinstance(answer, LaneReady):
                raise RuntimeError(f"a decoder process did not start: {answer}")
            ready += 1
        if time.perf_counter() - began > READY_S:
            raise RuntimeError(f"{ready} of {count} decoder processes were ready after {READY_S:.0f} s")
    return {"processes": count, "ready_after_s": time.perf_counter() - began}


def make(data: list[bytes], encoder: str, height: int, width: int) -> dict[str, int]:
    """Encodes the video into `data`: one picture that moves, and its noise apart, so that pictures differ as those of a camera do.

    Drawing every picture as the sample corpus does would take most of the section.
    """
    import av

    from pipeline.sample_corpus.scenes import SCENES

    rng = np.random.default_rng(0)
    picture_HW3 = np.minimum(SCENES["clouds"](rng, height, width)(0.0), 255 - NOISE)
    noise_HW3 = rng.integers(0, NOISE, picture_HW3.shape, np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm" if encoder == "libvpx-vp9" else "mp4") as output:
        stream: Any = output.add_stream(encoder, rate=30, options=ENCODING[encoder])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate = round(BITS_PER_PIXEL * 30 * height * width)
        for number in range(90 if height > 64 else 30):
            seen_HW3 = np.roll(picture_HW3, 3 * number, axis=1) + np.roll(noise_HW3, 31 * number, axis=0)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(seen_HW3, format="rgb24")))
        output.mux(stream.encode(None))
    data.append(buffer.getvalue())
    return {"bytes": len(data[-1])}


def rate(lanes: ProcessLanes, data: bytes, processes: int, measured_s: float, *, cuda: bool) -> dict[str, Any]:
    """Source frames a second of the first `processes` lanes that cut the same video again and again, for `measured_s` after the first ends.

    `cores`: CPU seconds of all decoders a second. `decoders`: what decoded the videos. `same`: whether frames have the bits of libav's.
    """
    from pipeline.records import FrameChunk, OpenedVideo, VideoEnded

    request, tickets = cut_request(data, cuda=cuda), [0] * lanes.count
    decoders: Counter[str] = Counter()
    first: FrameChunk | None = None
    frames = cpu_s = 0.0
    running, began, until = processes, time.perf_counter(), 0.0

    def again(lane: int) -> None:
        tickets[lane] = next(TICKETS)
        lanes.open(lane, tickets[lane], request)
        for _ in range(3):
            lanes.pull(lane, tickets[lane])

    for lane in range(processes):
        again(lane)
    while running:
        for lane, ticket, answer in lanes.wait(1.0):
            if ticket != tickets[lane]:
                continue  # pulled beyond the end of a video
            if isinstance(answer, VideoEnded):
                frames, cpu_s = frames + answer.frames_decoded, cpu_s + answer.decode_s
                until = until or time.perf_counter() + measured_s
                if time.perf_counter() < until:
                    again(lane)
                else:
                    tickets[lane] = next(TICKETS)
                    running -= 1
            elif isinstance(answer, FrameChunk):
                first = first or answer
                lanes.pull(lane, ticket)
            elif isinstance(answer, OpenedVideo):
                decoders[next((w for w in answer.info.warnings if "nvdec" in w), "libav")] += 1
            else:
                raise RuntimeError(f"a decoder answered {answer!r}")
    wall_s = time.perf_counter() - began
    same = first is not None and same_as_libav(first.planes_T3HW, data)
    if not same:
        raise RuntimeError("the frames differ from those decoded on the CPU")
    return {"frames_per_s": frames / wall_s, "cores": cpu_s / wall_s, "decoders": dict(decoders), "same": same}


def beside(lanes: ProcessLanes, data: bytes, processes: int, machine: Machine) -> dict[str, float]:
    """Rate of this process's matrix products, alone and while `processes` lanes decode: processes share a GPU by turns."""
    side = 4096 if machine.cuda else 64
    values = torch.ones(side, side, dtype=torch.bfloat16 if machine.cuda else torch.float32, device=machine.device)

    def products(goes_on: Callable[[int], bool]) -> float:
        count, began = 0, time.perf_counter()
        while goes_on(count):
            for _ in range(10):
                values @ values
            if machine.cuda:
                torch.cuda.synchronize()
            count += 10
        return count / (time.perf_counter() - began)

    alone = products(lambda count: count < 200)
    with ThreadPoolExecutor(1) as thread:
        decoding = thread.submit(rate, lanes, data, processes, MEASURED_S if machine.cuda else 0.0, cuda=machine.cuda)
        shared = products(lambda count: not decoding.done() or not count)
        decoded = decoding.result()["frames_per_s"]
    return {"alone_per_s": alone, "beside_per_s": shared, "share": shared / alone, "frames_per_s": decoded}


def cut_request(data: bytes, *, cuda: bool) -> Any:
    """Clips of 256 pixels on a side, tiled."""
    from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
    from pipeline.records import EncodedVideo
    from pipeline.video.clips import resolve_rules
    from pipeline.video.cutting import CutRequest

    clips = validate(ClipConfig, {"size": "256x256", "frames": CLIP_FRAMES, "select": "tile", "upscale": True})
    decode = validate(DecodeConfig, {"device": "cuda", "nvdec_min_pixels": 0} if cuda else {})
    rules = resolve_rules(clips, 4, 8, "leanvae")
    return CutRequest(EncodedVideo("video", "memory", data), rules, decode, 16, validate(DrillConfig, {}))


def same_as_libav(planes_T3HW: Any, data: bytes) -> bool:
    """Whether the first chunk of the video is what a decoder on the CPU gives."""
    from pipeline.records import FrameChunk
    from pipeline.video.cutting import Cutter

    cutter = Cutter(cut_request(data, cuda=False))
    try:
        cutter.open()
        chunk = cutter.next()
        return isinstance(chunk, FrameChunk) and bool((chunk.planes_T3HW == planes_T3HW).all())
    finally:
        cutter.close()

"""Three uniform clips of an hour-long video with B-frames: CPU time for Matroska compared with MP4.

    python benchmarks/uniform_clips.py [--minutes 60] [--repeats 3]

A few clips of a long video should cost reading it and decoding a group of pictures for each, whatever the container.
"""

from __future__ import annotations

import argparse
import io
import time

import av
import numpy as np

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.records import EncodedVideo, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter

BAR = 1.3
FPS, GROUP, CLIPS = 24, 48, 3


def encoded_group() -> bytes:
    """MP4 of one group of pictures, 320x240."""
    buffer = io.BytesIO()
    texture = np.random.default_rng(0).integers(0, 255, (240, 320 + GROUP, 3), dtype=np.uint8)
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(GROUP), "bf": "2", "qp": "34"}
        for n in range(GROUP):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, n : n + 320]), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def long_video(container: str, group: bytes, groups: int) -> bytes:
    """The packets of `group`, `groups` times after each other."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(group)) as source, av.open(buffer, "w", format=container) as output:
        template = source.streams.video[0]
        stream, time_base = output.add_stream_from_template(template), template.time_base
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in source.demux(template) if p.size]
        tick = round(1 / (FPS * time_base))
        for n in range(groups):
            for data, pts, dts, is_keyframe in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                packet.pts, packet.dts, packet.duration = pts + n * GROUP * tick, dts + n * GROUP * tick, tick
                output.mux(packet)
    return buffer.getvalue()


def cut(data: bytes) -> tuple[float, int]:
    """CPU seconds and decoded frames of the clips."""
    config = validate(ClipConfig, {"size": "64x64", "frames": 17, "select": f"uniform:{CLIPS}"})
    rules, limits = resolve_rules(config, 4, 8, "benchmark"), validate(DecodeConfig, {})
    cutter = Cutter(CutRequest(EncodedVideo("key", "memory", data), rules, limits, 16, validate(DrillConfig, {})))
    started = time.process_time()
    cutter.open()
    while not isinstance(answer := cutter.next(), VideoEnded):
        pass
    return time.process_time() - started, answer.frames_decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    group, best = encoded_group(), {}
    videos = {name: long_video(name, group, options.minutes * 60 * FPS // GROUP) for name in ("mp4", "matroska")}
    for _ in range(options.repeats):  # in turn, so that both see the same machine
        for name, data in videos.items():
            best[name] = min(best.get(name, (float("inf"), 0)), cut(data))
    for name, (seconds, frames) in best.items():
        print(f"{name}: {len(videos[name]) / 1e6:.0f} MB, {seconds:.2f} CPU s, {frames} frames decoded")
    print(f"RESULT {best['matroska'][0] / best['mp4'][0]:.2f} <= {BAR} three clips of a long Matroska file, of MP4")


if __name__ == "__main__":
    main()

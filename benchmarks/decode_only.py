"""Frames per second of one CPU core for decoding alone: open, plan, decode, scale. No encoder, no Ray.

    python benchmarks/decode_only.py [--seconds 4] [--repeats 3] [--json]

Videos are made from the scenes of the sample corpus. `raw` is libav alone (decode every frame, no scaling); `cut` is the whole path to
bucket-sized planes; `of_raw` is their ratio. CPU time of one thread, best of the repeats.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import av

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.records import ClipFailed, Sample, VideoEnded
from pipeline.sample_corpus import AV1, VP9, X264, X265, Recipe, encode_recipe
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter

CASES = {
    "h264 360p": Recipe("clouds", "", "mp4", "libx264", 360, 640, 30, 0, X264),
    "h264 720p": Recipe("clouds", "", "mp4", "libx264", 720, 1280, 30, 0, X264),
    "h264 1080p": Recipe("clouds", "", "mp4", "libx264", 1080, 1920, 30, 0, X264),
    "hevc 720p": Recipe("clouds", "", "mp4", "libx265", 720, 1280, 30, 0, X265),
    "vp9 720p": Recipe("clouds", "", "webm", "libvpx-vp9", 720, 1280, 30, 0, VP9),
    "av1 720p": Recipe("clouds", "", "mkv", "libsvtav1", 720, 1280, 30, 0, AV1),
    "h264 10-bit 720p": Recipe("clouds", "", "mp4", "libx264", 720, 1280, 30, 0, X264, "yuv420p10le"),
}
JOBS = {"tile 17x256x256": ({"select": "tile"}), "tile 17x256x256 @16fps": ({"select": "tile", "fps": 16.0})}


def cpu_s(work: Callable[[], int], repeats: int) -> tuple[int, float]:
    """What `work` returns and its shortest CPU time."""
    best, count = float("inf"), 0
    for _ in range(repeats):
        started = time.thread_time()
        count = work()
        best = min(best, time.thread_time() - started)
    return count, best


def decode_raw(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def cut(data: bytes, job: dict[str, object]) -> int:
    rules = resolve_rules(validate(ClipConfig, {"size": "256x256", **job}), 4, 8, "benchmark")
    sample = Sample("key", 0, "memory", data, "mp4")
    cutter = Cutter(CutRequest(sample.encoded_video, rules, validate(DecodeConfig, {}), 16, validate(DrillConfig, {})))
    cutter.open()
    frames = 0
    while not isinstance(answer := cutter.next(), VideoEnded):
        if isinstance(answer, ClipFailed):
            raise SystemExit(f"benchmark video failed: {answer.reject.message}")
        frames += len(answer.planes_T3HW)
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each video")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name, recipe in CASES.items():
        data = encode_recipe(replace(recipe, seconds=options.seconds), seed=0)
        decoded, raw_s = cpu_s(lambda data=data: decode_raw(data), options.repeats)
        for job_name, job in JOBS.items():
            frames, cut_s = cpu_s(lambda data=data, job=job: cut(data, job), options.repeats)
            row = {
                "video": name,
                "job": job_name,
                "source_frames": decoded,
                "clip_frames": frames,
                "raw_source_fps": round(decoded / raw_s, 1),
                "cut_source_fps": round(decoded / cut_s, 1),
                "cut_clip_fps": round(frames / cut_s, 1),
                "of_raw": round(raw_s / cut_s, 3),
            }
            rows.append(row)
            if not options.json:
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                print(f"RESULT {row['cut_source_fps']:.0f} frames per CPU second of one thread, {name}, {job_name}")
    if options.json:
        versions = {"av": av.__version__, "python": platform.python_version(), "machine": platform.machine()}
        print(
            json.dumps(
                {"benchmark": "decode_only", "unit": "frames per CPU second of one thread", **versions, "rows": rows}
            )
        )


if __name__ == "__main__":
    main()

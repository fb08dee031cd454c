"""A build compared with encoding alone and decoding alone, over the same clips in one run: frames per second and ratios.

    python benchmarks/end_to_end.py [--videos 8] [--executor inline,ray] [--repeats 1] [--compile off] [--json FILE]

`encode only` feeds the network frames that are already decoded; `decode only` cuts the same clips in as many processes as the build
uses; `end to end` is `pipeline.encode` from tars to receipts, from the moment its first encoder is up. The bar: end to end >= 0.9 of
the lower one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import pipeline
from pipeline.config import EncodeJob, build_job
from pipeline.encoder import Encoder, resolve_device
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.records import FrameChunk, Sample, VideoEnded
from pipeline.sample_corpus import X264, Recipe, encode_recipe
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest

BAR = 0.9
CLIPS_PER_VIDEO = 2


def make_shards(folder: Path, videos: int, per_shard: int = 4) -> None:
    """Tars of 640x360 H.264 at 24 fps, long enough for two clips of 17 frames each."""
    for shard in range(videos // per_shard):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for n in range(per_shard):
                recipe = Recipe("clouds", "", "mp4", "libx264", 360, 640, 24, (17 * CLIPS_PER_VIDEO + 2) / 24, X264)
                data = encode_recipe(recipe, shard * per_shard + n)
                member = tarfile.TarInfo(f"{shard:03d}{n:03d}.mp4")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def samples(folder: Path) -> list[Sample]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append(Sample(member.name[:-4], len(found), str(path), file.read(), "mp4"))
    return found


def decode_only(job: EncodeJob, corpus: list[Sample], processes: int) -> tuple[float, list[FrameChunk]]:
    """Frames per second of `processes` decoders over the corpus, and what they cut."""
    rules = resolve_rules(job.clips, 4, 8, "leanvae")
    lanes = ProcessLanes(processes, job.decode.memory_bytes)
    ready = 0
    while ready < processes:
        ready += sum(isinstance(answer, LaneReady) for _, _, answer in lanes.wait(10))
    waiting, running, chunks = list(corpus), 0, []
    idle = list(range(processes))
    begun = time.perf_counter()
    while waiting or running:
        while waiting and idle:
            lane = idle.pop()
            request = CutRequest(waiting.pop().encoded_video, rules, job.decode, job.engine.chunk_frames, job.drill)
            lanes.open(lane, len(waiting), request)
            for _ in range(CLIPS_PER_VIDEO + 1):
                lanes.pull(lane, 0)
            running += 1
        for lane, _, answer in lanes.wait(1.0):
            if isinstance(answer, FrameChunk):
                chunks.append(answer)
            elif isinstance(answer, VideoEnded):
                running -= 1
                idle.append(lane)
    spent = time.perf_counter() - begun
    lanes.close()
    return sum(len(chunk.pts_s) for chunk in chunks) / spent, chunks


def encode_only(job: EncodeJob, chunks: list[FrameChunk], device: str, dtype: str) -> float:
    """Frames per second of the network alone, batched as the build would."""
    threads, compiled = job.engine.threads or os.cpu_count(), job.engine.compile == "on"
    encoder = Encoder(job.model, device, dtype, moments=False, threads=threads, compiled=compiled)
    first = chunks[0].planes_T3HW
    batch = encoder.largest_batch((True, first.shape[0], first.shape[2], first.shape[3]))
    encoder.encode(chunks[:batch], [None] * len(chunks[:batch]))
    begun = time.perf_counter()
    for start in range(0, len(chunks), batch):
        part = chunks[start : start + batch]
        encoder.encode(part, [None] * len(part))
    return sum(len(chunk.pts_s) for chunk in chunks) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--executor", default="inline,ray")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", default="off", choices=["on", "off"], help="rates are without the time of compiling"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    results: dict[str, list[float]] = {"encode only": [], "decode only": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        make_shards(folder / "in", args.videos)
        corpus = samples(folder / "in")
        for repeat in range(args.repeats):
            for executor in args.executor.split(","):
                output = folder / f"out-{executor}-{repeat}"
                flags = {"inputs": [str(folder / "in")], "output": str(output), "model.untrained": 0}
                flags |= {
                    "clips.select": "tile",
                    "engine.executor": executor,
                    "engine.compile": args.compile,
                    "progress": "none",
                    "model.device": args.device,
                }
                job = build_job(flags)
                cuda = False
                if args.device != "cpu":
                    import torch

                    cuda = torch.cuda.is_available()
                device, dtype = resolve_device(args.device, "auto", cuda=cuda)
                rate, chunks = decode_only(job, corpus, os.cpu_count() or 1)
                results["decode only"].append(rate)
                results["encode only"].append(encode_only(job, chunks, device, dtype))
                report = pipeline.encode(job)
                assert report.counts.clips == len(corpus) * CLIPS_PER_VIDEO, report
                results.setdefault(f"end to end, {executor}", []).append(report.frames_per_s)
    medians = {label: statistics.median(values) for label, values in results.items()}
    bound = min(medians["encode only"], medians["decode only"])
    print(f"{'':24} frames/s   of the lower bound")
    for label, value in medians.items():
        print(f"{label:24} {value:8.1f}   {value / bound:.2f}")
    for label, value in medians.items():
        if label.startswith("end to end"):
            print(f"RESULT {value / bound:.3f} >= {BAR} {label}, of the lower of decode only and encode only")
    if args.json:
        ratios = {label: value / bound for label, value in medians.items()}
        record = {"frames_per_s": medians, "ratio": ratios, "machine": platform.processor() or platform.machine()}
        Path(args.json).write_text(json.dumps({**record, "cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()

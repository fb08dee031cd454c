"""Encode time of a build into a slow output store compared with a local folder.

    python benchmarks/slow_store.py [--rate 20] [--latency 0.3] [--shards 4] [--repeats 2] [--json FILE]

Both are local folders; the slow one sleeps `latency` seconds in every request and sends `rate` megabytes a second, one upload at a
time. Measured is the time from the first encode step to the end of the last one, in which the encoder should never wait for an upload.
What follows (upload and receipt of the last shard) is printed separately. Clips are small and files are closed at 4 MiB, so that
hundreds of clips are encoded during one upload, as on a GPU.
The bar: at most 5 % more time while the encoder is the limit.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import build_job
from pipeline.encoder import Encoder
from pipeline.sample_corpus import X264, Recipe, encode_recipe
from pipeline.storage.local import LocalStore

BAR = 1.05
PER_SHARD = 12
FRAMES = 200  # of a video: 40 clips
BLOCK_BYTES = 256 * 1024
REQUESTS = ("stat", "read", "write", "put_if_absent", "delete")


def make_shards(folder: Path, shards: int) -> None:
    """Tars of small H.264 videos, so that decoding is not the limit. Four videos are encoded and repeated under other keys."""
    recipe = Recipe("clouds", "", "mp4", "libx264", 96, 96, 24, FRAMES / 24, X264)
    videos = [encode_recipe(recipe, n) for n in range(4)]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for n in range(PER_SHARD):
                member = tarfile.TarInfo(f"{shard:03d}{n:03d}.mp4")
                member.size = len(videos[n % 4])
                tar.addfile(member, io.BytesIO(videos[n % 4]))


@contextmanager
def slowed(root: Path, latency_s: float, rate: float) -> Iterator[None]:
    """Requests to the store at `root` take `latency_s`, uploads also their size over `rate` (bytes a second)."""
    kept = {name: getattr(LocalStore, name) for name in (*REQUESTS, "upload")}

    def request(name: str) -> Any:
        def call(self: LocalStore, *arguments: Any, **options: Any) -> Any:
            if self.root == str(root):
                time.sleep(latency_s)
            return kept[name](self, *arguments, **options)

        return call

    def upload(self: LocalStore, local_path: Any, key: str, *, progress: Any = None) -> Any:
        if self.root == str(root):
            time.sleep(latency_s)
            for _ in range(0, os.path.getsize(local_path), BLOCK_BYTES):
                time.sleep(BLOCK_BYTES / rate)
        return kept["upload"](self, local_path, key, progress=progress)

    for name in REQUESTS:
        setattr(LocalStore, name, request(name))
    LocalStore.upload = upload  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(LocalStore, name, method)


@contextmanager
def step_times() -> Iterator[list[float]]:
    """Begin and end of every encode step."""
    launch, times = Encoder.launch, []

    def timed(self: Encoder, *arguments: Any) -> Any:
        times.append(time.perf_counter())
        launched = launch(self, *arguments)
        times.append(time.perf_counter())
        return launched

    Encoder.launch = timed  # type: ignore[method-assign]
    try:
        yield times
    finally:
        Encoder.launch = launch  # type: ignore[method-assign]


def build(inputs: Path, output: Path) -> tuple[float, float, int]:
    """Seconds from the first encode step to the end of the last, seconds after it, and bytes written."""
    flags = {
        "inputs": [str(inputs)],
        "output": str(output),
        "model.untrained": 0,
        "clips.select": "tile",
        "clips.frames": "5",
        "clips.size": "64x64",
        "write.dtype": "float32",
        "write.moments": True,
        "write.row_group_bytes": 1024 * 1024,
        "write.file_bytes": 4 * 1024 * 1024,
        "engine.executor": "inline",
        "progress": "none",
    }
    with step_times() as times:
        report = pipeline.encode(build_job(flags))
        ended = time.perf_counter()
    assert report.ok, report
    return times[-1] - times[0], ended - times[-1], report.num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=20.0, help="megabytes a second")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds a request")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"local": [], "slow": []}
    after: dict[str, list[float]] = {"local": [], "slow": []}
    num_bytes = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        make_shards(folder / "in", args.shards)
        for repeat in range(args.repeats):
            # Alternating order, so that a machine that gets slower or faster favours neither.
            for kind in ("local", "slow") if repeat % 2 == 0 else ("slow", "local"):
                output = folder / f"{kind}-{repeat}"
                with slowed(folder / f"slow-{repeat}", args.latency, args.rate * 1e6):
                    spent, rest, num_bytes = build(folder / "in", output)
                seconds[kind].append(spent)
                after[kind].append(rest)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratio = medians["slow"] / medians["local"]
    print(
        f"{args.shards} shards, {num_bytes / 1e6:.1f} MB; slow store: {args.rate:g} MB/s, {args.latency:g} s a request"
    )
    for kind, value in medians.items():
        print(f"{kind:6} {value:7.2f} s of encoding, then {statistics.median(after[kind]):5.2f} s")
    print(f"RESULT {ratio:.3f} <= {BAR} time into a slow store, of a local folder")
    if args.json:
        record = {"seconds": medians, "ratio": ratio, "rate": args.rate, "latency_s": args.latency}
        Path(args.json).write_text(json.dumps({**record, "cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()

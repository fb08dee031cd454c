"""Overhead of a shard: 1,000 shards of one tiny video each compared with the same videos in one shard, and the resume.

    python benchmarks/tiny_shards.py [--shards 1000] [--executor inline] [--repeats 1] [--json FILE]

Each video is 9 frames of 64x64, encoded at 32x32 by a LeanVAE of few layers, so that nearly all time is overhead. Times are from the moment
the first encoder is up. Overhead is (many shards - one shard) / shards. The split is the encoder's own time as receipts record it; `write`
(data file, index, receipt: each checked and flushed to disk) runs beside the rest. `resume` is a complete second run that finds everything
done, loading of the network included. `--executor inline,ray` runs both.
The bar: inline overhead <= 50 ms a shard.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import build_job
from pipeline.sample_corpus import X264, Recipe, encode_recipe

BAR_MS = 50.0
DISTINCT = 16  # videos that are really different; the rest are copies under other keys
TINY = {
    "embedding_dim": 32,
    "latent_dim": 4,
    "ista_iter_num": 2,
    "ista_layer_num": 2,
    "l_dim": 8,
    "h_dim": 24,
    "sep_num_layer": 1,
    "fusion_num_layer": 1,
}


def make_corpora(folder: Path, shards: int) -> None:
    """`many/` holds a tar per video, `one/` all videos in a single tar."""
    recipe = Recipe("plasma", "", "mp4", "libx264", 64, 64, 8, 9 / 8, X264)
    videos = [encode_recipe(recipe, seed) for seed in range(min(DISTINCT, shards))]
    (folder / "many").mkdir()
    (folder / "one").mkdir()
    with tarfile.open(folder / "one" / "all.tar", "w") as together:
        for n in range(shards):
            with tarfile.open(folder / "many" / f"{n:06d}.tar", "w") as alone:
                for tar in (together, alone):
                    member = tarfile.TarInfo(f"{n:06d}.mp4")
                    member.size = len(videos[n % DISTINCT])
                    tar.addfile(member, io.BytesIO(videos[n % DISTINCT]))


def build(inputs: Path, output: Path, executor: str) -> pipeline.BuildReport:
    """One run of `pipeline.encode` with nothing shown."""
    flags = {
        "inputs": [str(inputs)],
        "output": str(output),
        "model.name": "leanvae",
        "model.config": TINY,
        "model.untrained": 0,
        "clips.frames": "9",
        "clips.size": "32x32",
        "engine.executor": executor,
        "progress": "none",
    }
    return pipeline.encode(build_job(flags))


def measure(folder: Path, executor: str, shards: int) -> dict[str, Any]:
    """Both builds and the resume, once."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        one = build(folder / "one", Path(run) / "one", executor)
        many = build(folder / "many", Path(run) / "many", executor)
        again = build(folder / "many", Path(run) / "many", executor)
    assert one.counts.clips == many.counts.clips == shards, (one, many)
    assert again.shards_before == shards, again
    working_s = {"many": many.wall_s - many.startup_s, "one": one.wall_s - one.startup_s}
    per_shard = 1000 / shards
    timings = many.timings
    return {
        "executor": executor,
        "shards": shards,
        "ms_per_shard": round(working_s["many"] * per_shard, 2),
        "ms_per_video_in_one_shard": round(working_s["one"] * per_shard, 2),
        "overhead_ms": round((working_s["many"] - working_s["one"]) * per_shard, 2),
        "fetch_ms": round(timings.fetch_s * per_shard, 2),
        "decode_wait_ms": round(timings.decode_wait_s * per_shard, 2),
        "encode_ms": round(timings.encode_s * per_shard, 2),
        "write_ms": round(timings.write_s * per_shard, 2),
        "startup_s": round(many.startup_s, 2),
        "resume_s": round(again.wall_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--executor", default="inline", help="inline, ray or both with a comma")
    parser.add_argument("--repeats", type=int, default=1, help="medians over so many runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_corpora(Path(name), args.shards)
        for executor in args.executor.split(","):
            runs = [measure(Path(name), executor, args.shards) for _ in range(args.repeats)]
            row = {
                key: value if key == "executor" else statistics.median(r[key] for r in runs)
                for key, value in runs[0].items()
            }
            rows.append(row)
            print(
                f"{executor:7}{row['shards']} shards: {row['ms_per_shard']:.1f} ms each, "
                f"{row['ms_per_video_in_one_shard']:.1f} ms a video in one "
                f"shard, overhead {row['overhead_ms']:.1f} ms a shard\n"
                f"       of encoder time, ms a shard: fetch {row['fetch_ms']:.1f}, decode wait {row['decode_wait_ms']:.1f}, encode "
                f"{row['encode_ms']:.1f}; beside it write {row['write_ms']:.1f}\n"
                f"       start {row['startup_s']:.1f} s; resume of the finished build {row['resume_s']:.1f} s",
                flush=True,
            )
    for row in rows:
        if row["executor"] == "inline":
            print(f"RESULT {row['overhead_ms']:.1f} <= {BAR_MS:.0f} ms of overhead a shard of one tiny video, inline")
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "bar_ms": BAR_MS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

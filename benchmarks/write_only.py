"""Rate of writing latent files (finished, checked, uploaded) compared with copying the same bytes in the same run.

    python benchmarks/write_only.py [--mebibytes 512] [--folder DIR] [--json FILE]

Latents are random and in memory; the store is a local folder. The copy uses the same store (copy, fsync, rename), so the ratio is the
cost of layout, statistics, hashing and reading back. `long` is one whole-video latent mapped from a file; its peak memory is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DrillConfig, StorageConfig, WriteConfig
from pipeline.format.layout import CURRENT
from pipeline.format.tensors import release_pages
from pipeline.records import Bucket, ClipPlan, LatentClip, Sample, VideoInfo
from pipeline.storage import open_store
from pipeline.writer import ShardWriter

SPEC = {"network": "none", "latent_channels": 16, "time_stride": 4, "lead_frames": 1, "space_stride": 8}
MiB = 1024 * 1024
REPEATS = 3


def clip(number: int, latent_CTHW: np.ndarray, bucket: Bucket, dtype: str) -> LatentClip:
    frames = (latent_CTHW.shape[1] - 1) * 4 + 1
    sample = Sample(
        f"video{number:06d}",
        number,
        "s3://corpus/shard.tar",
        b"",
        "mp4",
        "a caption of common length " * 4,
        {"n": number},
    )
    info = VideoInfo(
        "h264", "yuv420p", 640, 480, 640, 480, 0, (1, 1), 30.0, 300, 10.0, "bt709", "limited", f"{number:032x}"
    )
    plan = ClipPlan(0, 0, bucket, 24.0, 0.0, bucket.height, bucket.width, 0, 0)
    return LatentClip(f"video{number:06d}-0000", sample, info, plan, frames, frames / 24, latent_CTHW, None, dtype)


def write(folder: Path, config: WriteConfig, clips: list[LatentClip]) -> tuple[float, list[str]]:
    """Seconds for a shard of `clips`, and the paths of its data files."""
    store = open_store(str(folder / "out"), StorageConfig())
    writer = ShardWriter(
        store,
        folder / "spool",
        config,
        shard_id="0" * 32,
        attempt="bench",
        fingerprint="0" * 32,
        metadata={"spec": SPEC, "encoder": {}, "fingerprint_parts": {}, "versions": {}},
        layout=CURRENT,
        drill=DrillConfig(),
    )
    begun = time.perf_counter()
    with writer:
        for item in clips:
            writer.add(item)
        files, _ = writer.finish()
    seconds = time.perf_counter() - begun
    return seconds, [store.uri(item.key) for item in files]


def copy(folder: Path, paths: list[str]) -> float:
    """Seconds to upload finished files to the same kind of store."""
    store = open_store(str(folder / "copy"), StorageConfig())
    begun = time.perf_counter()
    for number, path in enumerate(paths):
        store.upload(path, f"data/{number}")
    return time.perf_counter() - begun


def measure(folder: Path, format: str, dtype: str, mebibytes: int, latent_size: tuple[int, int, int]) -> dict[str, Any]:
    """Best of `REPEATS` for many clips of one size."""
    frames, height, width = latent_size
    shape = (16, frames, height, width)
    rng = np.random.default_rng(0)
    source = rng.standard_normal(shape).astype(np.float32)
    array = (source.view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else source.astype(dtype)
    count = max(1, mebibytes * MiB // array.nbytes)
    bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)
    clips = [clip(number, np.roll(array, number), bucket, dtype) for number in range(count)]
    total = count * array.nbytes
    results = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory(dir=folder) as run:
            wrote, paths = write(Path(run), WriteConfig(format=format, dtype=dtype), clips)
            results.append((wrote, copy(Path(run), paths)))
    wrote, copied = min(seconds for seconds, _ in results), min(seconds for _, seconds in results)
    return {
        "format": format,
        "dtype": dtype,
        "latent_bytes": array.nbytes,
        "latents": count,
        "write_mb_s": round(total / wrote / 1e6, 1),
        "copy_mb_s": round(total / copied / 1e6, 1),
        "ratio_to_copy": round(copied / wrote, 3),
        "ms_per_latent": round(1000 * wrote / count, 3),
    }


def long_latent(folder: Path, format: str, mebibytes: int) -> dict[str, Any]:
    """One mapped latent in a process of its own, so that the peak is only its."""
    command = [sys.executable, __file__, "--long", format, "--mebibytes", str(mebibytes), "--folder", str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def long_latent_here(folder: Path, format: str, mebibytes: int) -> dict[str, Any]:
    """Resident memory, mapped pages included, at its highest while writing, above what it was before."""
    frames = mebibytes * MiB // (16 * 32 * 32 * 2)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        mapped = np.memmap(Path(run) / "latent.bin", np.float16, "w+", shape=(16, frames, 32, 32))
        for channel in range(16):
            mapped[channel] = np.random.default_rng(channel).standard_normal((frames, 32, 32), np.float32)
            release_pages(mapped)
        write(
            Path(run) / "warm",
            WriteConfig(format=format),
            [clip(0, mapped[:, :5].copy(), Bucket(17, 256, 256), "float16")],
        )
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = high_water()
        seconds, _ = write(Path(run), WriteConfig(format=format), [clip(0, mapped, Bucket(0, 256, 256), "float16")])
        return {
            "format": format,
            "latent_mb": round(mapped.nbytes / 1e6),
            "write_mb_s": round(mapped.nbytes / seconds / 1e6, 1),
            "extra_peak_mb": round((high_water() - before) / 1e6, 1),
        }


def high_water() -> int:
    """Highest resident size in bytes since it was reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--long", choices=("parquet", "tar"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.long:
        print(json.dumps(long_latent_here(args.folder, args.long, args.mebibytes)))
        return
    small, large = (5, 32, 32), (21, 60, 104)  # 17 frames of 256x256, 81 frames of 480x832
    rows = [
        measure(args.folder, format, dtype, args.mebibytes, size)
        for format in ("parquet", "tar")
        for dtype, size in (("float16", small), ("float16", large), ("bfloat16", large))
    ]
    for row in rows:
        print(
            f"{row['format']:8}{row['dtype']:9} {row['latent_bytes'] / 1e6:5.2f} MB latents: write {row['write_mb_s']:7.1f} MB/s, "
            f"copy {row['copy_mb_s']:7.1f} MB/s, ratio {row['ratio_to_copy']:.2f}, {row['ms_per_latent']:.2f} ms each"
        )
    for format in ("parquet", "tar"):
        ratio = min(row["ratio_to_copy"] for row in rows if row["format"] == format)
        print(f"RESULT {ratio:.2f} rate of writing latents, of copying the bytes, {format}")
    longs = [long_latent(args.folder, format, args.mebibytes) for format in ("parquet", "tar")]
    for row in longs:
        print(
            f"{row['format']:8}long {row['latent_mb']} MB: write {row['write_mb_s']} MB/s, memory +{row['extra_peak_mb']} MB at its peak"
        )
    if args.json:
        args.json.write_text(json.dumps({"clips": rows, "long": longs}, indent=1))


if __name__ == "__main__":
    main()

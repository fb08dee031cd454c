"""Rate of `lathe compact` compared with copying the same bytes in the same run, and its peak memory.

Makes an output of many small Parquet or tar files with latents of a common size, one receipt each, and publishes it. The copy reads each
file from one store and uploads it to another (copy, fsync, rename); compaction reads and hashes every byte, writes it, reads it back and
hashes it again, uploads it, and publishes. Each runs in a process of its own.

    python -m benchmarks.compact [--mebibytes 512] [--formats parquet,tar] [--file-mebibytes 4] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.write_only import clip
from benchmarks.written_tars import commit_tar, in_own_process
from pipeline.config import StorageConfig
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.publish import PublishOptions, publish
from pipeline.records import Bucket
from pipeline.storage import Store, open_store

MiB = 1024 * 1024
SHAPE = (16, 5, 32, 32)  # 17 frames of 256 x 256
BUCKET = Bucket(17, 256, 256)
MEMORY_MB = 250


def make_output(store: Store, spool: Path, format: str, mebibytes: int, file_mebibytes: int) -> None:
    """An output of files of about `file_mebibytes`, published."""
    Ledger(store).prepare("bench")
    array = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    a_file = max(1, file_mebibytes * MiB // array.nbytes)
    for number in range(max(2, mebibytes // file_mebibytes)):
        uri = f"s3://corpus/{number:06d}.tar"
        made = (clip(n, np.roll(array, n), BUCKET, "float16") for n in range(number * a_file, (number + 1) * a_file))
        of_tar = (replace(one, sample=replace(one.sample, uri=uri)) for one in made)
        commit_tar(store, spool, uri, of_tar, format=format)
    publish(store, PublishOptions(delta=False))


def copy_here(root: str, folder: Path) -> dict[str, float]:
    """Seconds to copy the data files of the newest snapshot, one stream and one upload each."""
    source, target = (open_store(name, StorageConfig()) for name in (root, str(folder / "copy")))
    snapshots = Snapshots(source)
    keys = snapshots.table(snapshots.get(None), "files", ["key"])["key"].to_pylist()
    begun = time.perf_counter()
    num_bytes = 0
    for key in keys:
        info = source.stat(key)
        path = folder / "copied"
        with source.open_stream(key, size=info.size, etag=info.etag) as stream, path.open("wb") as out:
            while piece := stream.read(8 * MiB):
                out.write(piece)
        target.upload(path, key)
        num_bytes += info.size
    return {"seconds": time.perf_counter() - begun, "bytes": num_bytes}


def compact_here(root: str) -> dict[str, float]:
    """Seconds of a compaction into files of 512 MB, and its peak memory beyond that of the imports."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    found = compact(open_store(root, StorageConfig()), CompactOptions(delta=False))
    seconds = time.perf_counter() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    return {"seconds": seconds, "bytes": found.bytes_read, "files": found.files_after, "megabytes": grown}


def measure(folder: Path, format: str, mebibytes: int, file_mebibytes: int) -> dict[str, Any]:
    """Rates of copy and compaction of one output."""
    root = str(folder / "out")
    make_output(open_store(root, StorageConfig()), folder / "spool", format, mebibytes, file_mebibytes)
    copied, done = (
        in_own_process("compact", "--step", step, "--root", root, "--folder", str(folder))
        for step in ("copy", "compact")
    )
    return {
        "format": format,
        "megabytes": round(done["bytes"] / 1e6, 1),
        "files_after": done["files"],
        "copy_mb_s": round(copied["bytes"] / copied["seconds"] / 1e6, 1),
        "compact_mb_s": round(done["bytes"] / done["seconds"] / 1e6, 1),
        "ratio_to_copy": round(copied["seconds"] / done["seconds"] * done["bytes"] / copied["bytes"], 3),
        "memory_mb": round(done["megabytes"], 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the output")
    parser.add_argument("--file-mebibytes", type=int, default=4, help="size of its files")
    parser.add_argument("--formats", default="parquet,tar")
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--step", choices=["copy", "compact"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(copy_here(args.root, args.folder) if args.step == "copy" else compact_here(args.root)))
        return
    results = []
    for format in args.formats.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="lathe-bench-") as folder:
            results.append(measure(Path(folder), format, args.mebibytes, args.file_mebibytes))
        one = results[-1]
        print(one)
        print(f"RESULT {one['ratio_to_copy']} compaction, rate against a plain copy, {format}")
        print(f"RESULT {one['memory_mb']} <= {MEMORY_MB} compaction, peak memory beyond imports in MB, {format}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

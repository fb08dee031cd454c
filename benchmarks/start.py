"""Start of a build over plain files: listing, comparing with receipts, grouping, shard ids. Time and memory of the driver.

    python benchmarks/start.py [--files 1000000] [--folders 1000] [--json FILE]

Makes `--files` names of files of one byte in `--folders` folders, lists them and finds the work twice, each in a fresh process: for the
first run (no receipt), and for a run that resumes with half of the sources covered by receipts of other groups. The same with a tenth
of the files shows whether time is linear: a file of the larger corpus should cost about as much as one of the smaller.
The bar for one million files: 60 s and 2 GB.
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

BAR_S, BAR_GB = 60.0, 2.0


def make_files(folder: Path, files: int, folders: int) -> None:
    """Hard links, one file a folder: a million names without a million inodes."""
    for n in range(folders):
        inner = folder / f"{n:05d}"
        inner.mkdir(parents=True)
        first = inner / f"clip-{n:08d}.mp4"
        first.write_bytes(b"x")
        for m in range(n + folders, files, folders):
            (inner / f"clip-{m:08d}.mp4").hardlink_to(first)


def measure(inputs: str, output: str, resumed: bool) -> dict[str, float]:
    """In this process: seconds and peak memory of a start."""
    import resource

    from pipeline.config import EncodeJob, StorageConfig
    from pipeline.corpus import resolve_inputs
    from pipeline.engine.driver.coverage import find_work

    begun = time.perf_counter()
    job = EncodeJob(inputs=(inputs,), output=output)
    shards = resolve_inputs(job.inputs, job.storage)
    listed_s = time.perf_counter() - begun
    receipts = half_covered(inputs, shards) if resumed else []
    started = time.perf_counter()
    todo = find_work(shards, receipts, "f" * 32, job).todo(StorageConfig())
    ids = {shard.id("f" * 32) for shard in todo}
    find_s = time.perf_counter() - started
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"list_s": listed_s, "find_s": find_s, "total_s": listed_s + find_s, "peak_gb": peak_gb, "shards": len(ids)}


def half_covered(inputs: str, shards: Any) -> list[Any]:
    """Summaries of receipts that cover every second file, ten each: groups that no present grouping would make."""
    from pipeline.ledger.summary import UNKNOWN_CONTENT, ReceiptSummary, source_id, uri_id

    sources = [source for shard in shards for source in shard.objects][::2]
    found = []
    for at in range(0, len(sources), 10):
        group = sources[at : at + 10]
        found.append(
            ReceiptSummary(
                key=f"_receipts/{at:032x}.json",
                size=1,
                etag="",
                shard_id=f"{at:032x}",
                fingerprint="f" * 32,
                created=str(at),
                attempt="a",
                sources=b"".join(map(source_id, group)),
                uris=b"".join(uri_id(source.uri) for source in group),
                contents=UNKNOWN_CONTENT * len(group),
                retry=None,
                same_as=None,
                container="parquet",
                samples=10,
                clips=10,
                damaged=0,
                damaged_regions=0,
                marks=bytes(len(group)),
                reasons="{}",
                limits="{}",
            )
        )
    return found


def run(inputs: Path, output: Path, resumed: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(inputs), str(output), str(int(resumed))]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        inputs, output, resumed = options.measure
        print(json.dumps(measure(inputs, output, bool(int(resumed)))))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lathe-start-") as folder:
        for files in (options.files // 10, options.files):
            inputs = Path(folder) / str(files)
            make_files(inputs, files, max(1, options.folders * files // options.files))
            for name, resumed in (("first", False), ("half covered", True)):
                found = run(inputs, Path(folder) / "out", resumed)
                results[f"{files} {name}"] = found
                print(
                    f"{files:9d} files, {name:12}: {found['total_s']:6.1f} s (list {found['list_s']:.1f}, find {found['find_s']:.1f}), "
                    f"{found['peak_gb']:.2f} GB, {found['shards']:.0f} shards",
                    flush=True,
                )
    for name in ("first", "half covered"):
        small, large = results[f"{options.files // 10} {name}"], results[f"{options.files} {name}"]
        ratio = large["total_s"] / 10 / small["total_s"]
        print(f"RESULT {ratio:.2f} time to list and group a file, of a corpus of a tenth, {name}")
        for value, bar, unit in ((large["total_s"], BAR_S, "s"), (large["peak_gb"], BAR_GB, "GB")):
            print(f"RESULT {value:.2f} <= {bar:g} {unit} to list and group {options.files} files, {name}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

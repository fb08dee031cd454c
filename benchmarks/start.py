"""Start of a build over plain files: listing, comparing with receipts, grouping, shard ids. Time and memory of the driver.

    python benchmarks/start.py [--files 1000000] [--folders 1000] [--json FILE]

Makes `--files` names of files of one byte in `--folders` folders, lists them and finds the work three times, each in a fresh process: for
the first run (no receipt), for a run that resumes with half of the sources covered by receipts of other groups, and for one that finds all
of them covered. The same with a tenth of the files shows whether time is linear: a file of the larger corpus should cost about as much as
one of the smaller. Times are CPU seconds, since the machine may do other work; listing waits for little else on a local disk.
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
# By case: every nth source is covered (0: none), in groups of so many.
CASES = {"first": (0, 0), "half covered": (2, 10), "finished": (1, 64)}


def make_files(folder: Path, files: int, folders: int) -> None:
    """Hard links, one file a folder: a million names without a million inodes."""
    for n in range(folders):
        inner = folder / f"{n:05d}"
        inner.mkdir(parents=True)
        first = inner / f"clip-{n:08d}.mp4"
        first.write_bytes(b"x")
        for m in range(n + folders, files, folders):
            (inner / f"clip-{m:08d}.mp4").hardlink_to(first)


def measure(inputs: str, output: str, case: str) -> dict[str, float]:
    """In this process: CPU seconds and peak memory of a start."""
    import resource

    from pipeline.config import EncodeJob, StorageConfig
    from pipeline.corpus import resolve_inputs
    from pipeline.engine.driver.coverage import find_work

    begun = time.process_time()
    job = EncodeJob(inputs=(inputs,), output=output)
    shards = resolve_inputs(job.inputs, job.storage)
    listed_s = time.process_time() - begun
    receipts = covered(shards, *CASES[case])
    started = time.process_time()
    work = find_work(shards, receipts, "f" * 32, job)
    ids = {shard.id("f" * 32) for shard in work.todo(StorageConfig())}
    before = work.before()
    find_s = time.process_time() - started
    if before.samples + sum(len(shard.objects) for shard in work.todo(StorageConfig())) != len(listed(shards)):
        raise SystemExit(f"{before.samples} sources are covered, {len(ids)} shards are left")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"list_s": listed_s, "find_s": find_s, "total_s": listed_s + find_s, "peak_gb": peak_gb, "shards": len(ids)}


def listed(shards: Any) -> list[Any]:
    """All sources."""
    return [source for shard in shards for source in shard.objects]


def covered(shards: Any, every: int, group_size: int) -> list[Any]:
    """Summaries of receipts that cover every nth file, `group_size` each."""
    if not every:
        return []
    from pipeline.ledger.summary import UNKNOWN_CONTENT, ReceiptSummary, source_id, uri_id

    sources = listed(shards)[::every]
    found = []
    for at in range(0, len(sources), group_size):
        group = sources[at : at + group_size]
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
                samples=len(group),
                clips=len(group),
                damaged=0,
                damaged_regions=0,
                marks=bytes(len(group)),
                reasons="{}",
                limits="{}",
            )
        )
    return found


def run(inputs: Path, output: Path, case: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(inputs), str(output), case]
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
        print(json.dumps(measure(*options.measure)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lathe-start-") as folder:
        for files in (options.files // 10, options.files):
            inputs = Path(folder) / str(files)
            make_files(inputs, files, max(1, options.folders * files // options.files))
            for name in CASES:
                found = run(inputs, Path(folder) / "out", name)
                results[f"{files} {name}"] = found
                print(
                    f"{files:9d} files, {name:12}: {found['total_s']:6.1f} s (list {found['list_s']:.1f}, find {found['find_s']:.1f}), "
                    f"{found['peak_gb']:.2f} GB, {found['shards']:.0f} shards",
                    flush=True,
                )
    for name in CASES:
        small, large = results[f"{options.files // 10} {name}"], results[f"{options.files} {name}"]
        ratio = large["total_s"] / 10 / small["total_s"]
        print(f"RESULT {ratio:.2f} time to list and group a file, of a corpus of a tenth, {name}")
        for value, bar, unit in ((large["total_s"], BAR_S, "s"), (large["peak_gb"], BAR_GB, "GB")):
            print(f"RESULT {value:.2f} <= {bar:g} {unit} to list and group {options.files} files, {name}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

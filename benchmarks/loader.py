"""Reading latents for training: Lathe's loader against other loaders and against plain `preadv`, its plan, its first batch, its memory.

Latents of 0.1, 1 and 4 MB, hot and cold page cache, local and from an S3 server of this machine. Every number of another loader is taken
in the same run; a loader that is not installed, or cannot read, is named. Peers live in an environment of their own. The whole run takes
about 45 minutes on two quiet cores, of which S3 is about half, and 15 GB below DIR, which is on ext4, xfs or btrfs:

    python -m benchmarks.loader --install .venv-loader
    python -m benchmarks.loader --peers .venv-loader --folder DIR

Parts of it: `--quick`, `--sizes 0.1`, `--skip-s3`, `--skip-local`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_rates import OurReads, RawReads

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    "--no-deps litdata lightning-utilities tifffile obstore",
    "--no-deps streaming-community transformers tokenizers regex brotli python-snappy cramjam xxhash zstd catalogue",
    "--no-deps pylance",
    "--no-deps lancedb lance-namespace lance-namespace-urllib3-client overrides deprecation",
]
SHARDS = 8
PLAN_ROWS, PLAN_S, PLAN_MB = 10_000_000, 1.0, 100.0
FIRST_FILES, FIRST_S = 100_000, 3.0
OF_RAW, OF_BEST = 0.8, 2.0
ROUNDS, SECONDS = 3, 1.5  # of each loader, in turn: what else the machine does then hits all of them
PAIRS = 5  # of the loader and plain reads in a round; their ratio is the median of pairs, since the rate of memory changes within seconds
BUSY_S = 0.005
PEER_LIMIT_S = 600


@dataclass(frozen=True)
class Size:
    """Latents of one size: side of the clip in pixels, rows in all, rows of a batch."""

    name: str
    side: int
    rows: int
    batch: int


SIZES = (Size("0.1 MB", 400, 2560, 32), Size("1 MB", 1264, 320, 16), Size("4 MB", 2528, 96, 8))
QUICK = (Size("0.1 MB", 400, 64, 8),)


def install(folder: Path) -> None:
    """A virtual environment that sees this one's packages and has the other loaders on top."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (place,) = folder.glob("lib/python*/site-packages")
        (place / "lathe.pth").write_text("\n".join(item for item in sys.path if item.endswith("site-packages")))
    for names in PACKAGES:
        done = subprocess.run([python, "-m", "pip", "install", "-q", "--no-input", *names.split()], check=False)
        if done.returncode:
            print(f"pip install {names} failed; the table will say which loaders are missing", file=sys.stderr)


def write(root: str, spool: Path, size: Size, container: str) -> None:
    """A published output of random latents in `SHARDS` files."""
    from pipeline.config import StorageConfig, WriteConfig
    from pipeline.ledger.receipts import Ledger
    from pipeline.operate.publish import PublishOptions, publish
    from pipeline.records import Bucket
    from pipeline.storage import open_store
    from tests.pipeline.latent_clips import latent_clip, write_shard

    store = open_store(root, StorageConfig())
    Ledger(store).prepare("bench")
    bucket = Bucket(17, size.side, size.side)
    for shard in range(SHARDS):
        rows = [latent_clip(10_000 * shard + n, bucket=bucket) for n in range(size.rows // SHARDS)]
        Ledger(store).commit(write_shard(store, spool, WriteConfig(format=container), rows, shard=shard))
    publish(store, PublishOptions(delta=False))


def place_of(size: Size, folder: Path) -> Path:
    """Where the latents of a size lie, a folder below for each form."""
    return folder / size.name.replace(" ", "")


def write_both(size: Size, folder: Path) -> None:
    """Lathe's own forms of a size, unless they are there."""
    for container in ("parquet", "tar"):
        if not (place_of(size, folder) / container).exists():
            write(str(place_of(size, folder) / container), folder / "spool", size, container)


def peak_mb() -> float:
    """Peak memory of this program; `ru_maxrss` is at least that of the program which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def peer_rate(
    python: Path, name: str, folder: Path, size: Size, seconds: float, arguments: list[str]
) -> dict[str, Any]:
    """What another loader gave, in a process of its own."""
    command = [python, "-m", "benchmarks.loader_peers", name, folder, str(size.batch), str(seconds), *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PEER_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"rate": 0.0, "problem": f"no end within {PEER_LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"rate": 0.0, "problem": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def in_child(function: str, *arguments: Any) -> dict[str, Any]:
    """The result of a function of this module, or of `MODULE.FUNCTION`, in a fresh process."""
    module, _, name = function.rpartition(".")
    program = f"import json; from benchmarks.{module or 'loader'} import {name} as call; print(json.dumps(call(*{list(arguments)!r})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_ours(uri: str, batch: int, seconds: float, cold: bool) -> dict[str, Any]:
    """Rates of the loader and of plain reads by the better number of threads, in turn, and peak memory of the loader."""
    ours = OurReads(uri, batch, cold=cold)
    if cold:
        from benchmarks.loader_peers import drop_pages

        rates, rss = [ours.rate(0)], peak_mb()
        ours.close()
        raw = RawReads(uri, batch)
        found = []
        for threads in (1, 2):
            drop_pages(uri)
            found.append(raw.rate(0, threads))
        return {"ours": rates, "raw": [max(found)], "rss_mb": rss}
    ours.rate(seconds / PAIRS)
    rss, raw = peak_mb(), RawReads(uri, batch)
    rates = [
        (ours.rate(seconds / PAIRS), max(raw.rate(seconds / PAIRS / 2, threads) for threads in (1, 2)))
        for _ in range(PAIRS)
    ]
    return {"ours": [one for one, _ in rates], "raw": [one for _, one in rates], "rss_mb": rss}


def busy(uri: str, batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds that a step of 5 ms of Python waits for a batch: reads of a batch in one system call, and one after another."""
    from pipeline.loader import fetch

    ours, together = OurReads(uri, batch, cold=False), fetch.read_together
    waits: dict[str, list[float]] = {"together": [], "each": []}
    for _ in range(PAIRS):
        for name, call in (("together", together), ("each", lambda reads: [False] * len(reads))):
            fetch.read_together = call
            waits[name].append(1000 * ours.waited(seconds / PAIRS, BUSY_S))
    return {name: float(np.median(found)) for name, found in waits.items()}


def plan(rows: int) -> dict[str, Any]:
    """Seconds and megabytes of the order of an epoch of so many rows in 40 buckets."""
    from pipeline.loader.epoch import BucketRows
    from pipeline.loader.order import DatasetRows, Order
    from pipeline.loader.rules import parse_rule

    rng = np.random.default_rng(0)
    files = np.bincount(rng.choice(40, max(40, rows // 256), p=rng.dirichlet(np.ones(40) * 2)), minlength=40)
    buckets = {
        f"17x{64 * n + 64}x64": BucketRows((5, 8 * n + 8, 8), np.full(count, 256, np.int64))
        for n, count in enumerate(files.tolist())
        if count
    }
    before = peak_mb()
    began = time.perf_counter()
    Order([DatasetRows("bench", buckets)], parse_rule(16)).batch(0)
    seconds = time.perf_counter() - began
    return {"s": seconds, "mb": peak_mb() - before}


def many_files(root: str, files: int) -> None:
    """Makes snapshot 2 of an output: so many files, hard links to those of snapshot 1."""
    from pipeline.config import StorageConfig
    from pipeline.ledger.manifest import FILES, TableSpool
    from pipeline.ledger.snapshots import Snapshots
    from pipeline.storage import open_store

    store = open_store(root, StorageConfig())
    snapshots = Snapshots(store)
    first = snapshots.read(1)
    rows = snapshots.table(first, "files").to_pylist()
    spool = TableSpool(FILES, Path(root) / "_files.parquet")
    for number in range(files):
        row = dict(rows[number % len(rows)])
        for name in ("key", "index_key"):
            old, new = store.uri(row[name]), store.uri(row[name].replace("-a1-", f"-{number:06d}-"))
            os.link(old, new)
            row[name] = row[name].replace("-a1-", f"-{number:06d}-")
        spool.add(row)
    tables = snapshots.write_tables(2, {"files": spool.finish()})
    snapshots.create(replace(first, number=2, parent=1, tables={**first.tables, **tables}))


def first_batch(uri: str) -> dict[str, Any]:
    """Seconds from opening a snapshot to the first batch."""
    began = time.perf_counter()
    import torch  # noqa: F401

    from pipeline.loader import LatentDataset, LatentLoader

    imported = time.perf_counter()
    loader = LatentLoader(LatentDataset.open(uri), batch=8)
    next(iter(loader))
    done = time.perf_counter()
    return {
        "s": done - imported,
        "import_s": imported - began,
        "rss_mb": peak_mb(),
    }


def compare(size: Size, folder: Path, python: Path, seconds: float, *, quick: bool) -> None:
    """One size, hot and cold: prints a row for each loader, and ratios. Medians of rounds in which all take their turn."""
    from benchmarks.loader_peers import PEERS, WORKERS

    place = place_of(size, folder)
    write_both(size, folder)
    for cold in (False, True):
        ours: list[dict[str, Any]] = []
        peers: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
        for _ in range(1 if quick else ROUNDS):
            ours.append(in_child("measure_ours", str(place / "parquet"), size.batch, seconds, cold))
            for name, rounds in peers.items():
                if rounds and not rounds[0]["rate"]:
                    continue
                workers = [rounds[0]["workers"]] if rounds else WORKERS  # the first round finds the better one
                arguments = ["--workers", *map(str, workers), *(["--cold"] * cold)]
                rounds.append(peer_rate(python, name, place, size, seconds, arguments))
        report(size, "cold" if cold else "hot", ours, peers, bars=not cold and not quick)
        if not cold:
            waits = in_child("busy", str(place / "parquet"), size.batch, seconds)
            shown = ", ".join(f"{name} {one:.1f} ms" for name, one in waits.items())
            print(f"waited for a batch by a step of {1000 * BUSY_S:.0f} ms of Python, reads of a batch: {shown}")
            print(f"RESULT {waits['together'] / waits['each']:.2f} of the wait with reads one by one, {size.name}")


def report(
    size: Size,
    state: str,
    ours: list[dict[str, Any]],
    peers: dict[str, list[dict[str, Any]]],
    *,
    bars: bool = False,
    plain: str = "plain preadv",
) -> None:
    """Prints the medians of all rounds and their ratios; the ratio to plain reads is the median of pairs."""
    pairs = np.array([pair for one in ours for pair in zip(one["ours"], one["raw"], strict=True)])
    lathe, raw = np.median(pairs, axis=0).tolist()
    of_raw = float(np.median(pairs[:, 0] / pairs[:, 1]))
    memory = max(one["rss_mb"] for one in ours)
    best = 0.0
    print(f"\n{size.name}, {state}: MB/s, RSS MB")
    print(f"  {plain:28s} {raw / 1e6:8.0f}")
    print(
        f"  {'lathe':28s} {lathe / 1e6:8.0f} {memory:7.0f}  rounds {[round(float(np.median(one['ours'])) / 1e6) for one in ours]}"
    )
    for name, rounds in peers.items():
        rate = float(np.median([one["rate"] for one in rounds]))
        best = max(best, rate)
        first = rounds[0]
        why = first.get("missing") or (first.get("problem") if not first["rate"] else f"{first.get('workers')} workers")
        shown = [round(one["rate"] / 1e6) for one in rounds]
        print(
            f"  {name:28s} {rate / 1e6:8.0f} {max(one.get('rss_mb', 0) for one in rounds):7.0f}  {why}, rounds {shown}"
        )
    if best:
        bar = f" >= {OF_BEST}" if bars else ""
        print(f"RESULT {lathe / best:.2f}{bar} loader against the best other, {size.name} {state}")
        print(f"RESULT {best / raw:.2f} best other of {plain}, {size.name} {state}")
    bar = f" >= {OF_RAW}" if bars and size.name != "0.1 MB" else ""
    print(f"RESULT {of_raw:.3f}{bar} loader of {plain}, {size.name} {state}")
    print(f"RESULT {memory:.0f} MB of the loader's process, {size.name} {state}", flush=True)


def plan_and_first_batch(folder: Path, *, quick: bool) -> None:
    """Prints what the order of 10 million rows costs, and how soon the first batch of 100,000 files is there."""
    found = in_child("plan", 100_000 if quick else PLAN_ROWS)
    print(f"RESULT {found['s']:.2f} <= {PLAN_S} seconds to plan 10 million rows")
    print(f"RESULT {found['mb']:.0f} <= {PLAN_MB} MB to plan 10 million rows")
    small = Size("tiny", 64, 64, 8)
    write(str(folder / "many"), folder / "spool", small, "parquet")
    many_files(str(folder / "many"), 200 if quick else FIRST_FILES)
    found = in_child("first_batch", str(folder / "many"))
    print(f"first batch: imports {found['import_s']:.1f} s before, {found['rss_mb']:.0f} MB RSS")
    print(f"RESULT {found['s']:.2f} <= {FIRST_S} seconds to the first batch of {FIRST_FILES} files")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", type=Path, help="make the environment of the other loaders here, and end")
    parser.add_argument("--peers", type=Path, default=Path(".venv-loader"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip-s3", action="store_true")
    parser.add_argument("--skip-local", action="store_true")
    parser.add_argument("--sizes", nargs="+", help="first digits of the sizes to measure: 0.1, 1, 4")
    arguments = parser.parse_args()
    if arguments.install:
        return install(arguments.install)
    python = Path(os.path.abspath(arguments.peers)) / "bin" / "python"
    if not python.exists():
        print(f"{arguments.peers} is not there: only loaders of this environment are compared; make it with --install")
        python = Path(sys.executable)
    seconds = 0.2 if arguments.quick else SECONDS
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        chosen = [one for one in SIZES if arguments.sizes is None or one.name.split()[0] in arguments.sizes]
        sizes = list(QUICK) if arguments.quick else chosen
        if not arguments.skip_local:
            plan_and_first_batch(folder, quick=arguments.quick)
            for size in sizes:
                compare(size, folder, python, seconds, quick=arguments.quick)
        if not arguments.skip_s3:
            from benchmarks.loader_s3 import compare_s3

            compare_s3(sizes, folder, python, 1 if arguments.quick else ROUNDS)
    return None


if __name__ == "__main__":
    main()

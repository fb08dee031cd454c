"""Publishing many shards: time and peak memory of `publish`, time to open the snapshot, time of `status`.

Makes an output of N receipts of one tar each, with statistics of 16 channels and small data and index files, then runs each step in
a process of its own. The second publish follows 100 new and 10 replaced shards.

    python -m benchmarks.publish [--shards 100000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.index import IndexRow, write_index
from pipeline.format.layout import CURRENT
from pipeline.ledger.receipts import Ledger
from pipeline.records import (
    ChannelStats,
    Counts,
    Receipt,
    Reject,
    Shard,
    SourceObject,
    Timings,
    WrittenFile,
)
from pipeline.storage.local import LocalStore

FINGERPRINT = "5a" * 16
CHANNELS = 16
VALUES = 5 * 1024  # of a channel of a clip
BARS = {"publish_s": 60.0, "publish_mb": 300.0, "open_s": 1.0, "status_s": 2.0}


@functools.cache
def content() -> bytes:
    """A Parquet file with the footer of a real one: 40 rows in 2 row groups of 25 columns."""
    out = io.BytesIO()
    table = pa.table({f"column{n}": pa.array(range(40)) for n in range(25)})
    pq.write_table(table, out, row_group_size=20)
    return out.getvalue()


@functools.cache
def index_template(key: str) -> bytes:
    """The side index of the data file `key`, of 40 latents in float16."""
    latent = (2 * CHANNELS * VALUES, "00" * 16, None, None, None, (CHANNELS, 5, 32, 32), "float16", "v17x256x256", 17)
    rows = [IndexRow(f"{n:016x}", n, 0, *latent, "s3://corpus/0.tar", f"k{n}", "00" * 16, None) for n in range(40)]
    digest = hashlib.sha256(content()).hexdigest()
    with tempfile.NamedTemporaryFile() as file:
        about = {"key": key, "num_bytes": len(content()), "sha256": digest}
        write_index(Path(file.name), rows, {"data": about})
        return Path(file.name).read_bytes()


def index_of(key: str) -> bytes:
    """The side index of a data file. Keys have one length, so that the name in the footer can be replaced."""
    template = "x" * len(key)
    return index_template(template).replace(template.encode(), key.encode())


def receipt_of(number: int, version: int, rng: np.random.Generator) -> Receipt:
    """The receipt of tar `number` with 40 clips in one file and two rejects."""
    data = content()
    shard = Shard("tar", f"{number:06d}.tar", (SourceObject(f"s3://corpus/{number:06d}.tar", 10**9, f"e{version}"),))
    shard_id, attempt = shard.id(FINGERPRINT), f"{version:08x}-{number:08x}"
    stem = f"{FINGERPRINT[:8]}/v17x256x256/{shard_id[:16]}-{attempt}-00000"
    key = f"data/{stem}.parquet"
    index = index_of(key)
    file = WrittenFile(
        key,
        f"{CURRENT.index}{stem}{CURRENT.index_suffix}",
        "v17x256x256",
        len(data),
        len(index),
        40,
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256(index).hexdigest(),
        680,
    )
    mean, spread = rng.normal(0, 0.1, CHANNELS), rng.uniform(0.9, 1.1, CHANNELS)
    stats = ChannelStats(
        40 * VALUES, *(tuple(map(float, values)) for values in (mean, spread * 204800, mean - 4, mean + 4))
    )
    rejects = tuple(
        Reject(f"k{n}", "clips", "too_short", "got 3 frames, expected 17", policy=True, uri=shard.objects[0].uri)
        for n in (1, 2)
    )
    return Receipt(
        format_version=CURRENT.version,
        shard_id=shard_id,
        shard=shard,
        fingerprint=FINGERPRINT,
        fingerprint_parts={"encoder": {"network": "leanvae-dim16"}, "pixels": 2},
        attempt=attempt,
        created=f"2026-11-{version + 1:02d}T00:{number % 60:02d}:00.{number:06d}+00:00",
        files=(file,),
        counts=Counts(42, 40, 2, 40, 40, 0, 680),
        rejects=rejects,
        stats=stats,
        timings=Timings(),
        digests={shard.objects[0].uri: f"{number + version * 10**6:032x}"},
    )


def add(root: Path, numbers: range, version: int) -> None:
    """Writes receipts and files of these tars; plainly, because flushing each to disk is not what is measured."""
    rng = np.random.default_rng(version)
    for number in numbers:
        made = receipt_of(number, version, rng)
        for key, data in (
            (CURRENT.receipt_key(made.shard_id), made.to_json()),
            *(pair for item in made.files for pair in ((item.key, content()), (item.index_key, index_of(item.key)))),
        ):
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def step(name: str, root: str) -> dict[str, float]:
    """One measured step, in this process."""
    store = LocalStore(root)
    if name == "publish":
        from pipeline.operate.publish import PublishOptions, publish

        begun = time.perf_counter()
        publish(store, PublishOptions())
    elif name == "open":
        from pipeline.ledger.snapshots import Snapshots

        begun = time.perf_counter()
        snapshots = Snapshots(store)
        assert snapshots.table(snapshots.get(None), "files").num_rows
    else:
        from pipeline.operate.status import status

        begun = time.perf_counter()
        assert status(store)["snapshot"]
    seconds = time.perf_counter() - begun
    return {"s": seconds, "cpu_s": time.process_time(), "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measured(name: str, root: Path) -> dict[str, float]:
    """A step in a fresh process."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.publish", "--step", name, "--folder", str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(child.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", help="where to make the output; a temporary folder otherwise")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.folder)))
        return
    root = Path(options.folder or tempfile.mkdtemp(prefix="lathe-publish-"))
    try:
        Ledger(LocalStore(str(root))).prepare("benchmark")
        add(root, range(options.shards), 0)
        steps = {name: measured(name, root) for name in ("publish", "open", "status")}
        add(root, range(options.shards, options.shards + 100), 1)
        add(root, range(10), 2)
        steps["publish again"] = measured("publish", root)
        found = {
            "publish_s": max(steps[name]["s"] for name in ("publish", "publish again")),
            "publish_mb": max(steps[name]["mb"] for name in ("publish", "publish again")),
            "open_s": steps["open"]["s"],
            "status_s": steps["status"]["s"],
        }
        print(json.dumps({"shards": options.shards, "steps": steps}, indent=1, default=asdict))
        for name, value in found.items():
            print(f"RESULT {value:.2f} <= {BARS[name]:g} {name} of {options.shards} receipts")
    finally:
        if not options.folder:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

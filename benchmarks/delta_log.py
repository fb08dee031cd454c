"""Delta log of a large snapshot: its size, the time to write it, and the time deltalake takes to open it.

Makes a published snapshot of N files (the manifest only, no data), then writes the log in a process of its own.

    python -m benchmarks.delta_log [--files 100000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from pipeline.format.layout import DELTA_LOG
from pipeline.ledger.manifest import FILES, RECEIPTS, write_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.record_checks import CHANGES, COUNTS
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.operate.delta_log import DeltaLog
from pipeline.storage.local import LocalStore

FINGERPRINT = "5a" * 16


def publish(store: LocalStore, files: int) -> None:
    """Snapshot 1 with so many files of 40 rows."""
    Ledger(store).prepare("benchmark")
    rows = [
        {
            "key": f"data/{FINGERPRINT[:8]}/v17x256x256/{number:016x}-{number:08x}-00000.parquet",
            "index_key": f"_index/{number:016x}.idx",
            "bucket": "v17x256x256",
            "rows": 40,
            "frames": 680,
            "bytes": 13_000_000 + number,
            "sha256": "ab" * 32,
            "index_bytes": 9000,
            "index_sha256": "cd" * 32,
            "shard_id": f"{number:032x}",
            "network": "leanvae-dim16",
            "fingerprint": FINGERPRINT,
            "file_rows": 40,
            "file_frames": 680,
            "ranges": json.dumps(
                {
                    "id": [f"{number:06d}-clip-0000-{number:016x}", f"{number:06d}-clip-0039-{number:016x}"],
                    "fps": [8.0, 8.0],
                    "num_frames": [17, 17],
                }
            ),
            "hidden": [],
        }
        for number in range(files)
    ]
    snapshots = Snapshots(store)
    table = pa.Table.from_pylist(rows, FILES)
    parts = {
        "files": write_table(table, Path(store.uri("files.partial"))),
        "receipts": write_table(RECEIPTS.empty_table(), Path(store.uri("receipts.partial"))),
    }
    tables = snapshots.write_tables(1, parts)
    counts, changes = dict.fromkeys(COUNTS, 0), dict.fromkeys(CHANGES, 0)
    created = "2026-11-28T00:00:00+00:00"
    snapshots.create(Snapshot(1, None, created, counts, {}, {}, {}, {}, changes, {}, (), (), (), (), tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        begun = time.perf_counter()
        DeltaLog(LocalStore(options.step)).sync()
        print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    from deltalake import DeltaTable

    with tempfile.TemporaryDirectory() as folder:
        publish(LocalStore(folder), options.files)
        command = [sys.executable, "-m", "benchmarks.delta_log", "--step", folder]
        written = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        sizes = [path.stat().st_size for path in (Path(folder) / DELTA_LOG).iterdir()]
        begun = time.perf_counter()
        table = DeltaTable(f"{folder}/data")
        assert len(table.file_uris()) == options.files
        opened = time.perf_counter() - begun
        old = time.perf_counter()
        DeltaTable(f"{folder}/data", version=0)
        print(
            f"{options.files} files: written in {float(written[0]):.1f} s, {float(written[1]):.0f} MB peak of the process"
        )
        print(f"version 0 opens in {time.perf_counter() - old:.2f} s")
        print(f"RESULT {sum(sizes) / 1e6:.1f} <= 25 Delta log of {options.files} files, MB")
        print(f"RESULT {opened:.2f} <= 1 deltalake opens it and lists its files, s")


if __name__ == "__main__":
    main()

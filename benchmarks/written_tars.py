"""Output of a benchmark without a build: tars with receipts, from given latents; and steps of a benchmark in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from benchmarks.write_only import SPEC
from pipeline.config import DrillConfig, WriteConfig
from pipeline.format.layout import CURRENT
from pipeline.ledger.receipts import Ledger
from pipeline.records import Counts, Receipt, Reject, Shard, SourceObject, Timings
from pipeline.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pipeline.records import LatentClip, VideoCounts
    from pipeline.storage import Store

FINGERPRINT = "5a" * 16
PARTS = {"encoder": {"network": "none"}}


def commit_tar(
    store: Store,
    spool: Path,
    uri: str,
    clips: Iterable[LatentClip],
    *,
    format: str = "parquet",
    rejects: tuple[Reject, ...] = (),
    videos: VideoCounts | None = None,
) -> None:
    """Writes clips, one of each sample, and commits the receipt of their tar. `rejects`: one of each further sample.

    `videos`: entry of `Receipt.videos`; None: not recorded.
    """
    shard = Shard("tar", uri.rpartition("/")[2], (SourceObject(uri, 10**9, "e1"),))
    writer = ShardWriter(
        store,
        spool,
        WriteConfig(format=format, dtype="float16"),
        shard_id=shard.id(FINGERPRINT),
        attempt="a1",
        fingerprint=FINGERPRINT,
        metadata={"spec": SPEC, "encoder": PARTS["encoder"], "fingerprint_parts": PARTS, "versions": {}},
        layout=CURRENT,
        drill=DrillConfig(),
    )
    with writer:
        for clip in clips:
            writer.add(clip)
        files, stats = writer.finish()
    rows, frames = sum(item.rows for item in files), sum(item.frames for item in files)
    Ledger(store).commit(
        Receipt(
            format_version=CURRENT.version,
            shard_id=shard.id(FINGERPRINT),
            shard=shard,
            fingerprint=FINGERPRINT,
            fingerprint_parts=PARTS,
            attempt="a1",
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            files=files,
            counts=Counts(rows + len(rejects), rows, len(rejects), rows, rows, 0, frames),
            rejects=rejects,
            stats=stats,
            timings=Timings(encode_s=1.0),
            videos=None if videos is None else (videos,),
        )
    )


def in_own_process(benchmark: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a benchmark of this folder prints last: memory is then that of the step alone."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

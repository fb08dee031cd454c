"""Outputs for tests of `lathe gc`: versions of inputs, objects made older, and what a loader shows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.config import DrillConfig, WriteConfig
from pipeline.format.layout import CURRENT, SNAPSHOTS
from pipeline.ledger.receipts import Ledger
from pipeline.loader import LatentDataset
from pipeline.operate.gc import GcOptions
from pipeline.records import LatentClip, Receipt, Shard, SourceObject
from pipeline.storage import Store
from pipeline.writer import ShardWriter
from tests.pipeline.latent_clips import FINGERPRINT, METADATA, latent_clip, receipt_of

DAY_S = 86400.0
NEWEST = GcOptions(keep_snapshots=1, keep_days=0)


def aged(store: Store, days: float = 3.0, keys: Iterable[str] | None = None) -> None:
    """Makes objects older by so many days: all of them, or those with these keys."""
    for key in list(keys if keys is not None else store.keys()):
        path = store.uri(key)
        found = os.stat(path)
        os.utime(path, (found.st_atime - days * DAY_S, found.st_mtime - days * DAY_S))


def write_files(store: Store, spool: Path, shard: Shard, clips: list[LatentClip], attempt: str = "a1") -> Receipt:
    """Writes the files of an attempt at a shard. Returns the receipt, not committed."""
    writer = ShardWriter(
        store,
        spool,
        WriteConfig(),
        shard_id=shard.id(FINGERPRINT),
        attempt=attempt,
        fingerprint=FINGERPRINT,
        metadata=METADATA,
        layout=CURRENT,
        drill=DrillConfig(),
    )
    with writer:
        for clip in clips:
            writer.add(clip)
        files, stats = writer.finish()
    return replace(receipt_of(files, stats, attempt=attempt), shard_id=shard.id(FINGERPRINT), shard=shard)


def tar(name: str, version: str) -> Shard:
    """The shard of one version (etag) of the tar `name`."""
    return Shard("tar", f"{name}.tar", (SourceObject(f"s3://corpus/{name}.tar", 1000, version),))


def write_version(
    store: Store, spool: Path, name: str, version: str, seeds: Iterable[int], attempt: str = "a1"
) -> Receipt:
    """Commits one version of the tar `name`, with a clip for each seed."""
    shard = tar(name, version)
    clips = [latent_clip(seed, uri=shard.objects[0].uri, key=f"{name}/{seed}") for seed in seeds]
    return Ledger(store).commit(write_files(store, spool, shard, clips, attempt))


def shown(store: Store, number: int | str = "latest") -> set[str]:
    """Ids of all rows of a snapshot, each read with its tensors."""
    dataset = LatentDataset.open(store.root, number)
    found = {row.id for row in dataset.rows()}
    dataset.close()
    return found


def stored(store: Store) -> set[str]:
    """Keys of data files and indexes."""
    return {key for prefix in ("data/", "_index/") for key in store.keys(prefix) if "_delta_log" not in key}


def files_of(*receipts: Receipt) -> set[str]:
    """Keys of data files and indexes that receipts name."""
    return {key for receipt in receipts for item in receipt.files for key in (item.key, item.index_key)}


def snapshot_numbers(store: Store) -> list[int]:
    """Snapshots whose records are there."""
    found = (info.key for info in store.list(SNAPSHOTS, recursive=False))
    return sorted(int(key.removeprefix(SNAPSHOTS).removesuffix(".json")) for key in found)


def receipt_for(store: Store, name: str, version: str = "e1") -> Receipt | None:
    return Ledger(store).read(tar(name, version).id(FINGERPRINT))


def listing(store: Store) -> dict[str, str]:
    return {info.key: info.etag for info in store.list()}

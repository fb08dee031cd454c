"""Outputs with a history, to compact: tars and plain films in several buckets, replaced, taken down; and what a snapshot's files hold."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import WriteConfig
from pipeline.format.codec import held_type
from pipeline.format.layout import CURRENT, retired_key, snapshot_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.records import Bucket, LatentClip, Receipt, Shard, SourceObject
from pipeline.storage import Store
from tests.pipeline.latent_clips import FINGERPRINT, SMALL, latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all

WIDE = Bucket(17, 48, 64)
CONFIG = WriteConfig()


def tar(name: str) -> str:
    return f"s3://corpus/{name}.tar"


def film(name: str) -> str:
    return f"s3://corpus/{name}.mp4"


def clips_of(uri: str, seeds: list[int], config: WriteConfig = CONFIG) -> list[LatentClip]:
    """A clip of each bucket for every seed."""
    options = {"uri": uri, "dtype": held_type(config.dtype), "moments": config.moments, "store": config.store}
    return [
        latent_clip(seed, bucket=bucket, clip=clip, **options)
        for seed in seeds
        for clip, bucket in enumerate((SMALL, WIDE))
    ]


def add_tar(
    store: Store,
    folder: Path,
    name: str,
    seeds: list[int],
    etag: str,
    config: WriteConfig = CONFIG,
    fingerprint: str = FINGERPRINT,
) -> Receipt:
    """Commits a tar with a sample for each seed."""
    source = SourceObject(tar(name), 1000, etag)
    shard, clips = Shard("tar", f"{name}.tar", (source,)), clips_of(source.uri, seeds, config)
    return _commit(store, folder, shard, clips, config, fingerprint)


def add_films(store: Store, folder: Path, films: dict[str, tuple[int, str]], config: WriteConfig = CONFIG) -> Receipt:
    """Commits a group of plain films: name -> (seed, etag)."""
    sources = tuple(SourceObject(film(name), 1000, etag) for name, (_, etag) in sorted(films.items()))
    clips = [clip for name, (seed, _) in sorted(films.items()) for clip in clips_of(film(name), [seed], config)]
    return _commit(store, folder, Shard("files", "films", sources), clips, config)


def _commit(
    store: Store,
    folder: Path,
    shard: Shard,
    clips: list[LatentClip],
    config: WriteConfig,
    fingerprint: str = FINGERPRINT,
) -> Receipt:
    attempt = f"a{len(list(store.list('_receipts/')))}"
    made = write_shard(store, folder / "spool", config, clips, attempt=attempt)
    samples = len({clip.sample.uri if shard.kind == "files" else clip.sample.key for clip in clips})
    counts = replace(made.counts, samples=samples, encoded=samples)
    named = {"fingerprint": fingerprint, "shard_id": shard.id(fingerprint)}
    return Ledger(store).commit(replace(made, shard=shard, counts=counts, **named))


def make_history(folder: Path, config: WriteConfig = CONFIG) -> Store:
    """An output with two snapshots. In the second, a tar and a film are replaced, and a sample is taken down."""
    store = local_store(folder / "out")
    Ledger(store).prepare("films")
    add_tar(store, folder, "a", [1, 2, 3], "a1", config)
    add_tar(store, folder, "b", [11, 12], "b1", config)
    add_films(store, folder, {"f": (21, "f1"), "g": (22, "g1"), "h": (23, "h1")}, config)
    publish_all(store, delta=False)
    add_tar(store, folder, "b", [13], "b2", config)
    add_films(store, folder, {"g": (24, "g2")}, config)
    record_takedown(store, "asked to", samples=[(tar("a"), "dir/video00002")])
    publish_all(store, delta=False)
    return store


def listing(**etags: str) -> list[SourceObject]:
    """Inputs as they are now; name -> etag. One letter in front of the version: `a` and `b` are tars."""
    return [SourceObject(tar(n) if n in "ab" else film(n), 1000, etag) for n, etag in sorted(etags.items())]


def rows_of(store: Store, snapshot: Snapshot) -> dict[str, Any]:
    """By id: everything that the files of a snapshot hold of a row that counts. An id that occurs twice fails."""
    takedowns, found = read_takedowns(store), {}
    gone = {(uri, key) for item in takedowns.records for uri, key in item.samples}
    uris = {uri for item in takedowns.records for uri in item.sources}
    for file in Snapshots(store).table(snapshot, "files").to_pylist():
        read = _tar_rows if file["key"].endswith(".tar") else _parquet_rows
        for position, row in enumerate(read(store.uri(file["key"]))):
            values = json.loads(row["json"]) if "json" in row else row
            if position in file["hidden"] or values["source_uri"] in uris:
                continue
            if (values["source_uri"], values["source_key"]) in gone:
                continue
            assert values["id"] not in found
            found[values["id"]] = row
    return found


def _parquet_rows(path: str) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read().to_pylist()


def _tar_rows(path: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name, _, suffix = member.name.partition(".")
            if name != "__latentset__":
                found.setdefault(name, {})[suffix] = archive.extractfile(member).read()
    return list(found.values())


def delete_unnamed(store: Store) -> list[str]:
    """What `lathe gc` does in the end: only the newest snapshot stays, with its files and receipts. Returns the deleted data files."""
    snapshots = Snapshots(store)
    newest = snapshots.latest()
    for number in snapshots.numbers()[:-1]:
        store.delete(snapshot_key(number))
    receipts = snapshots.table(newest, "receipts", ["shard_id", "own_shard"]).to_pydict()
    for shard, counts in zip(*receipts.values(), strict=True):
        if not counts:
            key = CURRENT.receipt_key(shard)
            data = store.read(key)
            store.write(retired_key(shard, Receipt.from_json(data).attempt), data)
            store.delete(key)
    named = snapshots.table(newest, "files", ["key", "index_key"]).to_pydict()
    kept = {*named["key"], *named["index_key"]}
    gone = [key for prefix in ("data/", CURRENT.index) for key in store.keys(prefix) if key not in kept]
    gone = [key for key in gone if "_delta_log" not in key]
    for key in gone:
        store.delete(key)
    return [key for key in gone if key.startswith("data/")]

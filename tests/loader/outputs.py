"""Published outputs of small latents, written by the writer and the ledger, for tests of the loader."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config import StorageConfig, WriteConfig
from pipeline.ledger.receipts import Ledger
from pipeline.operate.publish import PublishOptions, publish
from pipeline.records import Bucket, LatentClip, Receipt, Shard, SourceObject
from pipeline.storage import Store, open_store
from tests.pipeline.latent_clips import FINGERPRINT, latent_clip, write_shard

IMAGE, SHORT, WIDE, WHOLE = Bucket(1, 32, 24), Bucket(9, 32, 24), Bucket(9, 32, 40), Bucket(0, 32, 24)
FRAMES = {IMAGE: 1, SHORT: 9, WIDE: 9}


@dataclass(frozen=True)
class Output:
    """A published output and the clips that were written to it, by id."""

    store: Store
    clips: dict[str, LatentClip] = field(repr=False)

    @property
    def uri(self) -> str:
        return self.store.root


def clip_of(seed: int, bucket: Bucket, num_frames: int | None = None, **options: Any) -> LatentClip:
    options = {"uri": f"s3://corpus/shard-{seed // 100:03d}.tar", **options}
    return latent_clip(seed, bucket=bucket, num_frames=num_frames or FRAMES[bucket], **options)


def write_output(
    root: str | Path,
    spool: Path,
    shards: list[list[LatentClip]],
    config: WriteConfig | None = None,
    storage: StorageConfig | None = None,
    *,
    first: int = 0,
    publishing: bool = True,
) -> Output:
    """Writes shards of clips, numbered from `first`, and publishes them."""
    store = open_store(str(root), storage or StorageConfig())
    Ledger(store).prepare("films")
    config = config or WriteConfig()
    for number, clips in enumerate(shards, first):
        Ledger(store).commit(write_shard(store, spool, config, clips, shard=number))
    if publishing:
        publish(store, PublishOptions(delta=False))
    return Output(store, {clip.id: clip for clips in shards for clip in clips})


def commit_files(
    store: Store, spool: Path, numbers: list[int], config: WriteConfig | None = None, *, shard: int
) -> Receipt:
    """Commits a shard of plain files with these numbers, a short clip of each. Two shards with one number are two runs that encoded it."""
    uris = [f"s3://corpus/video{n:05d}.mp4" for n in numbers]
    clips = [clip_of(n, SHORT, uri=uri, key=uri.rpartition("/")[2]) for n, uri in zip(numbers, uris, strict=True)]
    made = write_shard(store, spool, config or WriteConfig(), clips, shard=shard, attempt=f"a{shard}")
    objects = tuple(SourceObject(uri, 1000, f"e{n}") for n, uri in zip(numbers, uris, strict=True))
    described = Shard("files", f"files-{shard}", objects)
    return Ledger(store).commit(replace(made, shard=described, shard_id=described.id(FINGERPRINT)))


def mixed_shards(count: int = 3, **options: Any) -> list[list[LatentClip]]:
    """Shards of 4 images, 6 short and 5 wide clips each."""
    buckets = [IMAGE] * 4 + [SHORT] * 6 + [WIDE] * 5
    return [[clip_of(100 * shard + n, bucket, **options) for n, bucket in enumerate(buckets)] for shard in range(count)]

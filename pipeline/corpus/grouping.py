"""Grouping of plain videos and images into virtual shards of consecutive files, limited in number and bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import media_kind
from pipeline.records import Shard, SourceObject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import StorageConfig


IMAGES = 16  # in a group, for each video that it could hold: their latents are small, and so would be the data files of a group


def group_files(objects: Iterable[SourceObject], config: StorageConfig) -> list[Shard]:
    """Virtual shards of plain videos in the order of their URIs, then of images, named after the folder that their files share.

    A group ends at `files_per_shard` files or before it would exceed `shard_bytes`; a larger file is a group of its own. Of images it holds
    `IMAGES` times as many.
    """
    ordered = sorted(objects, key=lambda source: source.uri)
    videos = [source for source in ordered if media_kind(source.uri) is not None]
    images = [source for source in ordered if media_kind(source.uri) is None]
    return [
        *_groups(videos, config.files_per_shard, config.shard_bytes, "videos"),
        *_groups(images, IMAGES * config.files_per_shard, config.shard_bytes, "images"),
    ]


def _groups(ordered: list[SourceObject], most: int, most_bytes: int, kind: str) -> list[Shard]:
    groups: list[list[SourceObject]] = []
    group_bytes = 0
    for source in ordered:
        if not groups or len(groups[-1]) >= most or group_bytes + source.size > most_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(source)
        group_bytes += source.size
    return [Shard("files", f"{_shared_folder(group)}/{kind}-{n:05d}", tuple(group)) for n, group in enumerate(groups)]


def tar_shard(source: SourceObject) -> Shard:
    """The shard of a tar, named after its folder and file."""
    return Shard("tar", "/".join(source.uri.split("/")[-2:]), (source,))


def _shared_folder(group: list[SourceObject]) -> str:
    folders = [os.path.dirname(source.uri) for source in group]
    if len({"://" in folder for folder in folders}) > 1:  # local folders and a bucket
        return "files"
    return os.path.commonpath(folders).rpartition("/")[2] or "files"

"""Grouping of plain videos into virtual shards of consecutive files, limited in number and bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.records import Shard, SourceObject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import StorageConfig


def group_files(objects: Iterable[SourceObject], config: StorageConfig) -> list[Shard]:
    """Virtual shards of plain videos in the order of their URIs, named after the folder that their files share.

    A group ends at `files_per_shard` files or before it would exceed `shard_bytes`; a larger file is a group of its own.
    """
    groups: list[list[SourceObject]] = []
    group_bytes = 0
    for source in sorted(objects, key=lambda source: source.uri):
        full = groups and (len(groups[-1]) >= config.files_per_shard or group_bytes + source.size > config.shard_bytes)
        if not groups or full:
            groups.append([])
            group_bytes = 0
        groups[-1].append(source)
        group_bytes += source.size
    return [Shard("files", f"{_shared_folder(group)}/videos-{n:05d}", tuple(group)) for n, group in enumerate(groups)]


def tar_shard(source: SourceObject) -> Shard:
    """The shard of a tar, named after its folder and file."""
    return Shard("tar", "/".join(source.uri.split("/")[-2:]), (source,))


def _shared_folder(group: list[SourceObject]) -> str:
    folders = [os.path.dirname(source.uri) for source in group]
    if len({"://" in folder for folder in folders}) > 1:  # local folders and a bucket
        return "files"
    return os.path.commonpath(folders).rpartition("/")[2] or "files"

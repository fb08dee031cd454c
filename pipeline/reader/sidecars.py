"""Captions and json beside a plain video file: `clip.txt`, `clip.caption`, `clip.caption.txt`, `clip.json`, in any case.

In: a plain video's object. Out: (extension, bytes) of each text beside it, in the order in which captions are preferred. Local names are
asked for in three spellings, which costs a few microseconds; other spellings come from one listing of the folder for all its videos. In a
bucket, one listing of what begins with `clip.` tells the names, and each text that is there is one GET. A bucket that refuses to list is
asked for the three spellings.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound
from pipeline.reader.texts import TEXT_BYTES
from pipeline.storage import locate, open_store
from pipeline.storage.local_errors import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.config import StorageConfig
    from pipeline.records import SourceObject
    from pipeline.storage import Store

SUFFIXES = ("txt", "caption", "caption.txt", "json")
SPELLINGS = {suffix: (suffix, suffix.upper(), suffix.title()) for suffix in SUFFIXES}
FOLDERS_KEPT = 4


def read_sidecars(source: SourceObject, config: StorageConfig, refused: Callable[[], None]) -> list[tuple[str, bytes]]:
    """See the module. Of a text longer than `TEXT_BYTES` one byte more than that is read.

    `refused` is called once if the store does not let a text be read. A bucket that refuses to list answers so for absent texts too.

    Raises:
        StorageUnavailable: the store fails.
    """
    root, key = locate(source.uri)
    store = open_store(root, config)
    stem = os.path.splitext(key)[0]
    is_local = not source.uri.startswith("s3://")
    names = _in_folder(root, stem) if is_local else _in_bucket(store, stem)
    found, is_refused = [], False
    for suffix in SUFFIXES:
        for name in names[suffix]:
            try:
                if is_local:
                    store.stat(name)  # a folder or fifo may have the name
                found.append((suffix.rpartition(".")[2], store.read_range(name, 0, TEXT_BYTES + 1)))
            except NotFound:
                continue
            except AccessError:
                is_refused = True
                continue
            break
    if is_refused:
        refused()
    return found


def _in_bucket(store: Store, stem: str) -> dict[str, list[str]]:
    """By suffix, keys of texts that begin as the video's."""
    try:
        return _by_suffix(
            stem, [info.key for info in store.list(f"{stem}.", recursive=False) if _suffix(stem, info.key)]
        )
    except AccessError:
        return {suffix: [f"{stem}.{spelling}" for spelling in SPELLINGS[suffix]] for suffix in SUFFIXES}


def _in_folder(folder: str, stem: str) -> dict[str, list[str]]:
    """By suffix, names that a text may have: the three spellings, and others that are there."""
    try:
        with translated(folder):
            odd = _odd_spellings(folder, os.stat(folder).st_mtime_ns).get(stem, [])
    except (AccessError, NotFound):  # a folder may let its files be read and not be listed
        odd = []
    others = _by_suffix(stem, [name for name in odd if _suffix(stem, name)])
    return {suffix: [*(f"{stem}.{end}" for end in SPELLINGS[suffix]), *others[suffix]] for suffix in SUFFIXES}


@lru_cache(maxsize=FOLDERS_KEPT)
def _odd_spellings(folder: str, changed_ns: int) -> dict[str, list[str]]:
    """Names of texts whose suffix has none of the three spellings, by what stands before it. `changed_ns`: of the folder."""
    found: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            for suffix in SUFFIXES:
                stem, end = entry.name[: -len(suffix) - 1], entry.name[-len(suffix) - 1 :]
                if end.lower() == f".{suffix}" and end[1:] not in SPELLINGS[suffix]:
                    found.setdefault(stem, []).append(entry.name)
    return found


def _suffix(stem: str, name: str) -> str | None:
    """Suffix of the text `name` of a video, in small letters; None if it is not one."""
    suffix = name[len(stem) + 1 :].lower()
    return suffix if name.startswith(f"{stem}.") and suffix in SUFFIXES else None


def _by_suffix(stem: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of texts, those in small letters first."""
    found: dict[str, list[str]] = {suffix: [] for suffix in SUFFIXES}
    for name in sorted(names, key=lambda name: (not name.endswith(name.lower()[len(stem) + 1 :]), name)):
        found[name[len(stem) + 1 :].lower()].append(name)
    return found

"""Captions and json beside a plain video file: `clip.txt`, `clip.caption`, `clip.caption.txt`, `clip.json`, in any case.

In: a plain video's object. Out: (extension, bytes) of each text beside it, in the order in which captions are preferred. A local folder is
listed once for all its videos, as long as nothing is added to it. In a bucket one listing of what begins with `clip.` tells the names, and
each text that is there is one GET: a video with one text costs two requests, one without texts a single one. A bucket that is not listed
is asked for each name in three spellings.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound
from pipeline.reader.texts import TEXT_BYTES
from pipeline.storage import locate, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.config import StorageConfig
    from pipeline.records import SourceObject
    from pipeline.storage import Store

SUFFIXES = ("txt", "caption", "caption.txt", "json")
ENDINGS = tuple(f".{suffix}" for suffix in SUFFIXES)
LISTED_AT_MOST = 1000  # one page; where more objects begin with a stem, names are tried
FOLDERS_KEPT = 4


def read_sidecars(source: SourceObject, config: StorageConfig, refused: Callable[[], None]) -> list[tuple[str, bytes]]:
    """See the module. Of a text longer than `TEXT_BYTES` one byte more than that is read.

    `refused` is called for a text that the store does not let be read. A bucket whose listing is denied answers so for absent ones too.

    Raises:
        StorageUnavailable: the store fails.
    """
    root, key = locate(source.uri)
    store = open_store(root, config)
    stem = os.path.splitext(key)[0]
    listed = _in_bucket(store, stem) if source.uri.startswith("s3://") else _in_folder(os.path.join(root, stem), stem)
    found, denied = [], False
    for suffix in SUFFIXES:
        for name in _names(stem, suffix, listed):
            try:
                found.append((suffix.rpartition(".")[2], store.read_range(name, 0, TEXT_BYTES + 1)))
            except NotFound:  # or a folder of this name
                continue
            except AccessError:
                denied = True
                continue
            break
    if denied:
        refused()
    return found


def _in_bucket(store: Store, stem: str) -> list[str] | None:
    """Names that begin as the video's; None where the bucket does not list, or has too many of them."""
    try:
        names = [info.key for info in islice(store.list(f"{stem}.", recursive=False), LISTED_AT_MOST)]
    except AccessError:
        return None
    return names if len(names) < LISTED_AT_MOST else None


def _in_folder(path: str, stem: str) -> list[str]:
    """Keys of the texts whose name begins as the video's."""
    folder, base = os.path.split(path)
    texts = _texts_of(folder, os.stat(folder).st_mtime_ns)
    return [stem[: len(stem) - len(base)] + name for name in texts.get(base, ())]


@lru_cache(maxsize=FOLDERS_KEPT)
def _texts_of(folder: str, changed_ns: int) -> dict[str, list[str]]:
    """Names of the texts of a folder, by what stands before their suffix."""
    found: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for name in (entry.name for entry in entries):
            lower = name.lower()
            for ending in ENDINGS:
                if lower.endswith(ending):
                    found.setdefault(name[: -len(ending)], []).append(name)
    return found


def _names(stem: str, suffix: str, listed: Iterable[str] | None) -> list[str]:
    """Names that a text may have, small letters first."""
    if listed is not None:
        names = [name for name in listed if name[len(stem) + 1 :].lower() == suffix]
        return sorted(names, key=lambda name: (not name.endswith(suffix), name))
    return [f"{stem}.{spelling}" for spelling in (suffix, suffix.upper(), suffix.title())]

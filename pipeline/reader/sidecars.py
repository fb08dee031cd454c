"""Captions and json beside a plain video file: `clip.txt`, `clip.caption`, `clip.caption.txt`, `clip.json`, in any case.

In: a plain video's object. Out: (extension, bytes) of each text beside it, in the order in which captions are preferred. A local folder
is asked for each name in three spellings, which costs a few microseconds. In a bucket one listing of what begins with `clip.` tells the
names, and each text that is there is one GET: a video with one text costs two requests, one without texts a single one.
"""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound
from pipeline.reader.texts import TEXT_BYTES
from pipeline.storage import locate, open_store

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.records import SourceObject
    from pipeline.storage import Store

SUFFIXES = ("txt", "caption", "caption.txt", "json")
LISTED_AT_MOST = 1000  # one page; where more objects begin with a stem, names in small letters are tried


def read_sidecars(source: SourceObject, config: StorageConfig) -> list[tuple[str, bytes]]:
    """See the module. Of a text longer than `TEXT_BYTES` one byte more than that is read.

    Raises:
        StorageUnavailable: the store fails.
        AccessError: the store refuses a text.
    """
    root, key = locate(source.uri)
    store = open_store(root, config)
    stem = os.path.splitext(key)[0]
    listed = _listed(store, stem) if source.uri.startswith("s3://") else None
    found = []
    for suffix in SUFFIXES:
        for name in _names(stem, suffix, listed):
            try:
                if listed is None:
                    store.stat(name)  # a folder may have the name
                found.append((suffix.rpartition(".")[2], store.read_range(name, 0, TEXT_BYTES + 1)))
            except NotFound:
                continue
            break
    return found


def _listed(store: Store, stem: str) -> list[str] | None:
    """Names that begin as the video's; None where the bucket does not list, or has too many of them."""
    try:
        names = [info.key for info in islice(store.list(f"{stem}.", recursive=False), LISTED_AT_MOST)]
    except AccessError:  # it may still be read
        return None
    return names if len(names) < LISTED_AT_MOST else None


def _names(stem: str, suffix: str, listed: list[str] | None) -> list[str]:
    """Names that a text may have, small letters first."""
    if listed is not None:
        names = [name for name in listed if name[len(stem) + 1 :].lower() == suffix]
        return sorted(names, key=lambda name: (not name.endswith(suffix), name))
    return [f"{stem}.{spelling}" for spelling in (suffix, suffix.upper(), suffix.title())]

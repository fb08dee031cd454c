"""Captions and JSON beside a plain video file: `clip.txt`, `clip.caption`, `clip.caption.txt`, `clip.json`, in upper or lower case, and
captions with a name, as `clip.short.txt`.

In a local folder, three spellings are tried by name, which costs a few microseconds; other spellings and names come from one listing of
the folder for all its videos. In a bucket, one listing of the keys that begin with `clip.` finds them, and each text costs one GET. If the
bucket refuses to list, the three spellings are tried.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound
from pipeline.reader.texts import MOST_CAPTIONS, TEXT_BYTES
from pipeline.records import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, named_caption
from pipeline.storage import is_remote, locate, open_store
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
    """(suffix, bytes) of each text beside the video `source`, preferred captions first: `txt`, `caption`, `caption.txt`, `json`, then
    those with a name, `short.txt`. At most `TEXT_BYTES + 1` bytes of each.

    `refused` is called once if the store denies a text. A bucket that refuses to list also denies texts that do not exist.

    Raises:
        StorageUnavailable: the store fails.
    """
    root, key = locate(source.uri)
    store = open_store(root, config)
    stem = os.path.splitext(key)[0]
    is_local = not is_remote(source.uri)
    names = _in_folder(root, stem) if is_local else _in_bucket(store, stem)
    found, is_refused = [], False
    for suffix in names:
        for name in names[suffix]:
            try:
                if is_local:
                    store.stat(name)  # a folder or fifo may have the name
                found.append((suffix, store.read_range(name, 0, TEXT_BYTES + 1)))
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
    """Suffix -> keys of texts of the video."""
    try:
        keys = [info.key for info in store.list(f"{stem}.", recursive=False)]
    except AccessError:
        return {suffix: [f"{stem}.{spelling}" for spelling in SPELLINGS[suffix]] for suffix in SUFFIXES}
    named = _named(keys).get(stem, [])
    return {**_by_suffix(stem, [key for key in keys if _suffix(stem, key)]), **_of_names(stem, named)}


def _in_folder(folder: str, stem: str) -> dict[str, list[str]]:
    """Suffix -> names that a text may have: the three spellings, and others that the folder has."""
    try:
        with translated(folder):
            odd, named = _listed(folder, os.stat(folder).st_mtime_ns)
    except (AccessError, NotFound):  # files can be readable in a folder that cannot be listed
        odd, named = {}, {}
    others = _by_suffix(stem, [name for name in odd.get(stem, []) if _suffix(stem, name)])
    fixed = {suffix: [*(f"{stem}.{end}" for end in SPELLINGS[suffix]), *others[suffix]] for suffix in SUFFIXES}
    return {**fixed, **_of_names(stem, named.get(stem, []))}


@lru_cache(maxsize=FOLDERS_KEPT)
def _listed(folder: str, changed_ns: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Stem -> names of texts whose suffix has none of the three spellings; stem -> names of captions with a name. `changed_ns` of the
    folder is part of the cache key.
    """
    found: dict[str, list[str]] = {}
    dotted: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            for suffix in SUFFIXES:
                stem, end = entry.name[: -len(suffix) - 1], entry.name[-len(suffix) - 1 :]
                if end.lower() == f".{suffix}" and end[1:] not in SPELLINGS[suffix]:
                    found.setdefault(stem, []).append(entry.name)
            if named_caption(os.path.splitext(entry.name)[0]) is not None:
                dotted.append(entry.name)
    return found, _named(dotted)


def _named(names: Iterable[str]) -> dict[str, list[str]]:
    """Stem of a video -> names of its captions with a name, but not of those of a video that has their whole stem (`clip.short.mp4`)."""
    stems = [(os.path.splitext(name), name) for name in sorted(names)]
    videos = {stem for (stem, end), _ in stems if end[1:].lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)}
    found: dict[str, list[str]] = {}
    for (stem, end), name in stems:
        if end.lower() == ".txt" and stem not in videos and (named := named_caption(stem)) is not None:
            found.setdefault(named[0], []).append(name)
    return found


def _of_names(stem: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Suffix, `short.txt`, -> name of the text. Not more than count: a folder may hold any number."""
    return {name[len(stem) + 1 :]: [name] for name in islice(names, MOST_CAPTIONS)}


def _suffix(stem: str, name: str) -> str | None:
    """Suffix of a text of the video, in lower case; None if `name` is not one."""
    suffix = name[len(stem) + 1 :].lower()
    return suffix if name.startswith(f"{stem}.") and suffix in SUFFIXES else None


def _by_suffix(stem: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Suffix -> names of texts, lower case first."""
    found: dict[str, list[str]] = {suffix: [] for suffix in SUFFIXES}
    for name in sorted(names, key=lambda name: (not name.endswith(name.lower()[len(stem) + 1 :]), name)):
        found[name[len(stem) + 1 :].lower()].append(name)
    return found

"""One listing of a folder, prefix or pattern: its tars and videos, and what it holds besides, counted by kind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import NO_SUFFIX, UNKNOWN, is_hidden, is_text, media_kind, reason, suffix
from pipeline.corpus.texts import TextsAlone
from pipeline.records import SourceObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.corpus.passed_over import PassedOver
    from pipeline.storage import ObjectInfo, Store, Unlisted

NAMED = 5  # suffixes, reasons
HIDDEN = "names that begin with a dot, and __MACOSX"


def list_folder(
    store: Store,
    prefix: str,
    passed_over: PassedOver,
    *,
    below: str,
    recursive: bool = True,
    matches: Callable[[str], bool] = lambda key: True,
) -> tuple[list[SourceObject], Counter[str]]:
    """Tars and videos whose keys match, in key order, and counts of what else matches, by suffix.

    `below`: the folder in front of names that may be hidden.
    """
    found: list[SourceObject] = []
    besides: Counter[str] = Counter()
    texts = TextsAlone()

    def pass_over(key: str, what: str, why: str) -> None:
        passed_over.add(store.uri(key), what, why)

    def unlisted(entry: Unlisted) -> None:
        if matches(entry.key):
            besides[entry.what] += 1
            pass_over(entry.key, entry.what, entry.why)

    def alone(keys: Iterator[str]) -> None:
        for key in keys:
            pass_over(key, suffix(key), "without a video of the same name")

    for info in store.list(prefix, recursive=recursive, unlisted=unlisted):
        key = info.key
        if not matches(key):
            continue
        if is_hidden(key[len(below) :]):
            besides["hidden"] += 1
            pass_over(key, "hidden", HIDDEN)
            continue
        alone(texts.take(key))
        if media_kind(key):
            found.append(source_of(store, info))
            continue
        besides[suffix(key)] += 1
        if not is_text(key) and not _is_folder_marker(store, info):
            pass_over(key, suffix(key), reason(suffix(key)))
    alone(texts.rest())
    return found, besides


def source_of(store: Store, info: ObjectInfo) -> SourceObject:
    """A listed object as an input."""
    return SourceObject(store.uri(info.key), info.size, info.etag)


def tally(names: Counter[str]) -> str:
    """`3 .jpg, 1 .md`."""
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {name}" for name, n in ordered[:NAMED])


def why_not(suffixes: Iterable[str]) -> str:
    """Reasons why files of these suffixes are not encoded, in brackets; empty where it is only that they are not known."""
    reasons = dict.fromkeys(why for name in suffixes if (why := reason(name)) != UNKNOWN)
    return f" ({'; '.join(list(reasons)[:NAMED])})" if reasons else ""


def _is_folder_marker(store: Store, info: ObjectInfo) -> bool:
    """An empty object that some tools put where a folder would be: `vids/`, or `vids` beside `vids/a.mp4`."""
    return "://" in store.root and info.size == 0 and suffix(info.key) == NO_SUFFIX

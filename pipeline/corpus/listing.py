"""One listing of a folder, prefix or pattern: its tars and videos, and what it holds besides, counted by kind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import NO_SUFFIX, OTHER_SUFFIX, UNKNOWN, is_hidden, is_text, media_kind, reason, suffix
from pipeline.corpus.texts import TextsAlone
from pipeline.records import SourceObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.corpus.passed_over import PassedOver
    from pipeline.storage import ObjectInfo, Store, Unlisted

NAMED = 5  # suffixes, reasons
MOST_SUFFIXES = 500  # that are told apart: files may be numbered by their suffix
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

    def count(what: str) -> None:
        besides[what if what in besides or len(besides) < MOST_SUFFIXES else OTHER_SUFFIX] += 1

    def unlisted(entry: Unlisted) -> None:
        if matches(entry.key):
            count(entry.what)
            pass_over(entry.key, entry.what, entry.why)

    def alone(keys: Iterator[str]) -> None:
        for key in keys:
            pass_over(key, suffix(key), "without a video of the same name")

    for info in store.list(prefix, recursive=recursive, unlisted=unlisted):
        key = info.key
        if not matches(key):
            continue
        if is_hidden(key[len(below) :]):
            count("hidden")
            pass_over(key, "hidden", HIDDEN)
            continue
        kind, text = media_kind(key), is_text(key)
        alone(texts.take(key, video=kind == "video", text=text))
        if kind:
            found.append(source_of(store, info))
            continue
        end = suffix(key)
        count(end)
        if not text and not (info.size == 0 and end == NO_SUFFIX and "://" in store.root):  # a marker of a folder
            pass_over(key, end, reason(end))
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

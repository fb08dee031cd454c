"""Listing of one folder, prefix or pattern: its tars, videos and images, and counts of its other entries."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import NO_SUFFIX, OTHER_SUFFIX, UNKNOWN, is_hidden, is_text, media_kind, reason, suffix
from pipeline.corpus.texts import TextsAlone
from pipeline.records import SourceObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.corpus.passed_over import PassedOver
    from pipeline.records import ImagePolicy
    from pipeline.storage import ObjectInfo, Store, Unlisted

NAMED = 5  # suffixes and reasons in a message
MOST_SUFFIXES = 500  # counted separately: files may be numbered by their suffix
HIDDEN = "names that begin with a dot, and __MACOSX"


def list_folder(
    store: Store,
    prefix: str,
    passed_over: PassedOver,
    *,
    below: str,
    recursive: bool = True,
    matches: Callable[[str], bool] = lambda key: True,
    images: ImagePolicy = "skip",
    left_out: set[str] | None = None,
) -> tuple[list[SourceObject], Counter[str]]:
    """Tars, videos and, by `images`, images whose keys match, in key order, and counts by suffix of other entries that match.

    `below`: the folder that was named; hidden names are recognised only below it. `left_out` gets the URIs, without suffix, of videos that
    `images` leaves out.
    """
    found: list[SourceObject] = []
    others = _OtherEntries(store, passed_over, matches, images)
    for info in store.list(prefix, recursive=recursive, unlisted=others.unlisted):
        if not matches(info.key):
            continue
        if is_hidden(info.key[len(below) :]):
            others.hidden(info.key)
        elif others.file(info):
            found.append(source_of(store, info))
        elif left_out is not None and media_kind(info.key) == "video":
            left_out.add(os.path.splitext(store.uri(info.key))[0])
    others.end()
    return found, others.counts


class _OtherEntries:
    """Entries of one listing that are not encoded. `counts` are by suffix and include texts of videos."""

    def __init__(
        self, store: Store, passed_over: PassedOver, matches: Callable[[str], bool], images: ImagePolicy
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._store = store
        self._passed_over = passed_over
        self._matches = matches
        self._images = images
        self._texts = TextsAlone()

    def file(self, info: ObjectInfo) -> bool:
        """Takes the next file in key order; returns whether it is a tar or video."""
        key, kind, text = info.key, media_kind(info.key, self._images), is_text(info.key)
        self._texts_alone(self._texts.take(key, video=kind in ("video", "image"), text=text))
        if kind:
            return True
        end = suffix(key)
        self._count(end)
        folder_marker = info.size == 0 and end == NO_SUFFIX and "://" in self._store.root
        if not text and not folder_marker:
            self._pass_over(key, end, reason(end, self._images))
        return False

    def hidden(self, key: str) -> None:
        """Takes a file that is hidden or in a hidden folder."""
        self._count("hidden")
        self._pass_over(key, "hidden", HIDDEN)

    def unlisted(self, entry: Unlisted) -> None:
        """Takes an entry that is not a file."""
        if self._matches(entry.key):
            self._count(entry.what)
            self._pass_over(entry.key, entry.what, entry.why)

    def end(self) -> None:
        """Ends the listing."""
        self._texts_alone(self._texts.rest())

    def _texts_alone(self, keys: Iterator[str]) -> None:
        for key in keys:
            self._pass_over(key, suffix(key), "without a video of the same name")

    def _count(self, what: str) -> None:
        self.counts[what if what in self.counts or len(self.counts) < MOST_SUFFIXES else OTHER_SUFFIX] += 1

    def _pass_over(self, key: str, what: str, why: str) -> None:
        self._passed_over.add(self._store.uri(key), what, why)


def source_of(store: Store, info: ObjectInfo) -> SourceObject:
    """The source object of a listed one."""
    return SourceObject(store.uri(info.key), info.size, info.etag)


def tally(names: Counter[str]) -> str:
    """`3 .jpg, 1 .md`."""
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {name}" for name, n in ordered[:NAMED])


def why_not(suffixes: Iterable[str], images: ImagePolicy = "skip") -> str:
    """Reasons why files of these suffixes are not encoded, in brackets; empty if the suffixes are just unknown."""
    reasons = dict.fromkeys(why for name in suffixes if (why := reason(name, images)) != UNKNOWN)
    return f" ({'; '.join(list(reasons)[:NAMED])})" if reasons else ""

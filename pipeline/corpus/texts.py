"""Captions and json of a listing that have no video of the same name beside them, found in one pass in key order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import is_text, media_kind

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class _Stem:
    name: str  # the key without its suffix
    has_video: bool = False
    texts: list[str] = field(default_factory=list)


class TextsAlone:
    """Takes keys in order, gives texts without a video as soon as that is certain.

    Keys that begin with `stem.` follow each other in a listing, those of `stem.more.` within them.
    So what is open is a chain of stems, each of which begins with the one before, however many files there are.
    """

    def __init__(self) -> None:
        self._open: list[_Stem] = []

    def take(self, key: str) -> Iterator[str]:
        """The next key. Gives texts of stems that end before it."""
        while self._open and not key.startswith(f"{self._open[-1].name}."):
            yield from self._close()
        video, text = media_kind(key) == "video", is_text(key)
        if not video and not text:
            return
        name = os.path.splitext(key)[0]
        if not self._open or self._open[-1].name != name:
            self._open.append(_Stem(name))
        if video:
            self._open[-1].has_video = True
        else:
            self._open[-1].texts.append(key)

    def rest(self) -> Iterator[str]:
        """After the last key."""
        while self._open:
            yield from self._close()

    def _close(self) -> Iterator[str]:
        stem = self._open.pop()
        if not stem.has_video:
            yield from stem.texts

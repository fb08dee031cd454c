"""Search for captions and JSON without a video of the same name, in one pass over a listing in key order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.records import named_caption

if TYPE_CHECKING:
    from collections.abc import Iterator


CAPTION = ".caption"


@dataclass(slots=True)
class _Stem:
    name: str  # the key without its suffix
    prefix: str  # of its keys
    has_video: bool = False
    texts: list[str] = field(default_factory=list)


class TextsAlone:
    """Takes keys in order, yields texts without a video as soon as that is certain.

    Keys that begin with `stem.` are adjacent in a listing, those of `stem.more.` among them. Each open stem is a prefix of the next,
    so the stack stays short.
    """

    def __init__(self) -> None:
        self._open: list[_Stem] = []

    def take(self, key: str, *, video: bool, text: bool) -> Iterator[str]:
        """Takes the next key; yields texts of stems that end before it."""
        while self._open and not key.startswith(self._open[-1].prefix):
            yield from self._close()
        if not video and not text:
            return
        name = os.path.splitext(key)[0]
        if text and key.lower().endswith(f"{CAPTION}.txt") and not (self._open and self._open[-1].name == name):
            name = name[: -len(CAPTION)]  # `a.caption.txt` beside `a.mp4`
        if text and key.lower().endswith(".txt") and (named := named_caption(name)) is not None:
            self._stem(named[0])  # `a.short.txt` belongs to `a.mp4`, unless there is `a.short.mp4`
        stem = self._stem(name)
        if video:
            stem.has_video = True
        else:
            stem.texts.append(key)

    def _stem(self, name: str) -> _Stem:
        at = len(self._open)
        while at and len(self._open[at - 1].name) > len(name):
            at -= 1
        if not at or self._open[at - 1].name != name:
            self._open.insert(at, _Stem(name, f"{name}."))
            return self._open[at]
        return self._open[at - 1]

    def rest(self) -> Iterator[str]:
        """Ends the listing; yields the remaining texts."""
        while self._open:
            yield from self._close()

    def _close(self) -> Iterator[str]:
        stem = self._open.pop()
        if stem.has_video:
            return
        named = named_caption(stem.name)
        above = self._open[-1] if self._open else None
        for text in stem.texts:
            if named is not None and above is not None and above.name == named[0] and text.lower().endswith(".txt"):
                above.texts.append(text)
            else:
                yield text

"""Counts of listed files that are not encoded, by kind, with the reason and one example of each, as one line of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.corpus.kinds import OTHER_SUFFIX, UNKNOWN
from pipeline.errors import InputError
from pipeline.units import printable

REASONS_SHOWN = 16
KINDS_SHOWN = 5  # of one reason
MOST_KINDS = 500
MOST_REMEMBERED = 200_000  # URIs that are counted once, although several inputs list them
LONGEST_EXAMPLE = 100


@dataclass(slots=True)
class Kind:
    """Files of one suffix, or other entries of one type, that are passed over for one reason."""

    what: str  # ".jpg", "link", "hidden"
    why: str
    example: str
    count: int = 0


class PassedOver:
    """Counts of the entries of inputs that are not tars or videos, in bounded memory.

    Args:
        own: URIs of the output of this run, which are not counted; one that ends in `/` stands for everything below it.
    """

    def __init__(self, own: tuple[str, ...] = ()) -> None:
        self.taken = 0  # tars and videos of the same inputs
        self.count = 0
        self._own = own
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._known: set[int] = set()

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, uri: str, what: str, why: str) -> None:
        """Counts a file or entry, unless it was counted before through another input."""
        known = hash(uri)
        if known in self._known or (self._own and uri.startswith(self._own)):
            return
        if len(self._known) < MOST_REMEMBERED:
            self._known.add(known)
        self.count += 1
        if len(self._kinds) >= MOST_KINDS and (what, why) not in self._kinds:
            what, why = OTHER_SUFFIX, UNKNOWN
        self._kinds.setdefault((what, why), Kind(what, why, shown(uri))).count += 1

    def kinds(self) -> list[Kind]:
        """The most frequent first."""
        return sorted(self._kinds.values(), key=lambda kind: (-kind.count, kind.what, kind.why))

    def line(self) -> str:
        """`passed over 3 of 120 files: 2 .srt (subtitles are not read; e.g. /d/a.srt), …`; empty if nothing was passed over."""
        if not self.count:
            return ""
        by_reason: dict[str, list[Kind]] = {}
        for kind in self.kinds():
            by_reason.setdefault(kind.why, []).append(kind)
        groups = sorted(by_reason.values(), key=lambda group: (not _is_entry(group[0]), -_total(group)))
        parts = [f"{_named(group)} ({group[0].why}; e.g. {group[0].example})" for group in groups[:REASONS_SHOWN]]
        if rest := groups[REASONS_SHOWN:]:
            parts.append(f"{sum(map(_total, rest))} for {len(rest)} other reasons")
        return f"passed over {self.count} of {self.count + self.taken} files: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; empty if nothing was passed over."""
        if not self.count:
            return {}
        kinds = [
            {"what": kind.what, "why": kind.why, "count": kind.count, "example": kind.example} for kind in self.kinds()
        ]
        return {"line": self.line(), "passed_over": self.count, "taken": self.taken, "kinds": kinds}

    def refuse(self) -> None:
        """For `strict`: raises InputError with the line if anything was passed over."""
        if self.count:
            raise InputError(f"strict: {self.line()}; remove them from the inputs, or run without --strict")


def shown(uri: str) -> str:
    r"""A URI for printing on one line: bytes that are not UTF-8 as `\xff`, control characters escaped, cut if long."""
    text = printable(uri)
    half = LONGEST_EXAMPLE // 2
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:half]}…{text[-half:]}"


def _is_entry(kind: Kind) -> bool:
    """Whether it is a link, fifo or folder rather than a file. These are named first: they may have been meant as inputs."""
    return kind.what.isalpha() and kind.what != "hidden"


def _total(group: list[Kind]) -> int:
    return sum(kind.count for kind in group)


def _named(group: list[Kind]) -> str:
    names = [f"{kind.count} {kind.what}{'s' * (kind.count > 1 and _is_entry(kind))}" for kind in group[:KINDS_SHOWN]]
    if rest := group[KINDS_SHOWN:]:
        names.append(f"{_total(rest)} of {len(rest)} other suffixes")
    return ", ".join(names)

"""Files that were listed and will not be encoded: counted by kind, with the reason and one example of each, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.corpus.kinds import OTHER_SUFFIX, UNKNOWN
from pipeline.errors import InputError

REASONS_SHOWN = 16
KINDS_SHOWN = 5  # of one reason
MOST_KINDS = 500
MOST_REMEMBERED = 200_000  # URIs that are counted once although several inputs list them
LONGEST_EXAMPLE = 100


@dataclass(slots=True)
class Kind:
    """Files of one suffix, or entries of one nature, that are passed over for one reason."""

    what: str  # ".jpg", "link", "hidden"
    why: str
    example: str
    count: int = 0


class PassedOver:
    """What an input holds besides tars and videos. Bounded, whatever it holds.

    Args:
        own: URIs that are not counted: objects of the output of this run (those that end in `/` with all below them).
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
        """One file or entry. One that was counted before, through another input, is not counted again."""
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
        """`passed over 3 of 120 files: 2 .jpg (images are not encoded; e.g. /d/a.jpg), …`; empty if there is nothing to say."""
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
        """For `strict`: raises InputError, with the line, if anything was passed over."""
        if self.count:
            raise InputError(f"strict: {self.line()}; take them out of the inputs, or leave --strict out")


def shown(uri: str) -> str:
    r"""A URI as it can be printed on one line: bytes that are not UTF-8 as `\xff`, control characters escaped, a long one cut."""
    text = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST_EXAMPLE // 2
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:half]}…{text[-half:]}"


def _is_entry(kind: Kind) -> bool:
    """A link, fifo or folder, which may have stood for an input, not a file of another kind. Named first."""
    return kind.what.isalpha() and kind.what != "hidden"


def _total(group: list[Kind]) -> int:
    return sum(kind.count for kind in group)


def _named(group: list[Kind]) -> str:
    names = [f"{kind.count} {kind.what}{'s' * (kind.count > 1 and _is_entry(kind))}" for kind in group[:KINDS_SHOWN]]
    if rest := group[KINDS_SHOWN:]:
        names.append(f"{_total(rest)} of {len(rest)} other suffixes")
    return ", ".join(names)

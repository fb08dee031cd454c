"""Brace and glob patterns: expansion of braces, and the regular expression of a glob over whole keys."""

from __future__ import annotations

import re
from itertools import islice

from braceexpand import braceexpand

from pipeline.errors import InputError

WILDCARD = re.compile(r"[*?\[]")
MOST_EXPANSIONS = 1_000_000


def expand_braces(text: str) -> list[str]:
    """Names of a brace pattern: `a{0..2}.tar` -> three names; several braces multiply.

    Raises:
        InputError: more than `MOST_EXPANSIONS` names.
    """
    spans = [abs(int(last) - int(first)) for first, last in re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", text)]
    too_many = max(spans, default=0) > MOST_EXPANSIONS  # braceexpand builds a span in memory before its first name
    try:
        names = [] if too_many else list(islice(braceexpand(text), MOST_EXPANSIONS + 1))
    except ValueError:  # a lone brace is part of a name
        return [text]
    if too_many or len(names) > MOST_EXPANSIONS:
        raise InputError(f"{text}: more than {MOST_EXPANSIONS} names; use a folder, a glob or a list file")
    return names


def pattern_regex(pattern: str) -> str:
    """Regular expression of a glob over whole keys: `*` and `?` do not match `/`, `**` does."""
    parts = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", pattern, flags=re.S):
        simple = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}.get(token)
        if simple is not None:
            parts.append(simple)
        elif len(token) > 2 and token.startswith("["):
            negated = token[1] in "!^"
            body = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            parts.append(f"[{'^/' if negated else ''}{body}]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)

"""Text for people: sizes in bytes, durations in seconds, counts, names that come with the data."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def size(n: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration(seconds: float) -> str:
    """`3725` -> `1h02m`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def quantity(n: int, one: str, several: str = "") -> str:
    """A count with its noun: `1 row`, `2 rows`. `several`: the plural, if it is not `one` with an s; both may include the verb."""
    return f"{n} {one if n == 1 else several or one + 's'}"


def quantities(counts: Mapping[str, Any], *nouns: str) -> str:
    """Counts by plural noun: `{"rows": 1, "files": 2}`, `row`, `file` -> `1 row, 2 files`."""
    return ", ".join(quantity(counts[f"{noun}s"], noun) for noun in nouns)


def printable(text: str) -> str:
    r"""`text` for one line of a terminal: control characters and line ends are escaped, bytes that are not UTF-8 (lone surrogates) are
    `\xff`. Names of files and tar members may hold both: a terminal would obey the first, and stdout refuses the second.
    """
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    return f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char.encode("unicode_escape").decode()

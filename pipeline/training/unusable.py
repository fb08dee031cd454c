"""Samples that no clip can be cut from: said once each, whoever of many loading processes meets them.

Enters: key, reason, message. Leaves: a line of `unusable.jsonl`. Loaders, ranks and runs that continue share the file.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from typing import IO


class Unusable:
    """The list of a run. Pickles; processes that append to it at once wait for each other."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[tuple[str, str, str]] = set()
        self._read = 0  # bytes of the file that are known

    def add(self, uri: str, key: str, reason: str, message: str) -> None:
        """Says it, unless it was said."""
        said = uri, key, reason
        if said in self._known:
            return
        line = json.dumps({"uri": uri, "key": key, "reason": reason, "message": message}) + "\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when the process dies
            self._catch_up(file)
            if said not in self._known:
                file.write(line.encode())
        self._known.add(said)

    def forget(self) -> None:
        """The corpus is another one: what was said of the last is gone."""
        self.path.unlink(missing_ok=True)
        self._known, self._read = set(), 0

    def tally(self) -> dict[str, int]:
        """How many samples there are of each reason."""
        if not self.path.exists():
            return {}
        with self.path.open("rb") as file:
            self._catch_up(file)
        return dict(Counter(reason for _, _, reason in self._known).most_common())

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_known": set(), "_read": 0}

    def _catch_up(self, file: IO[bytes]) -> None:
        file.seek(self._read)
        for line in file:
            if not line.endswith(b"\n"):  # a process died while it wrote: closed by the next line, and skipped for good
                if file.writable():
                    file.write(b"\n")
                break
            self._read += len(line)
            if line.startswith(b"{") and line.endswith(b"}\n"):
                told = json.loads(line)
                self._known.add((told["uri"], told["key"], told["reason"]))

"""List of samples without a usable clip, each reported once in `unusable.jsonl`, which loaders, ranks and continued runs share."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os
    from typing import IO


class Unusable:
    """Unusable samples of a run. Pickles; concurrent processes lock the file to append."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[tuple[str, str, str]] = set()
        self._read = 0  # bytes of the file read so far

    def add(self, uri: str, key: str, reason: str, message: str, *, found: Literal["index", "clip"] = "clip") -> None:
        """Appends the sample and reason, unless they are listed. `found`: when the corpus was indexed, or when a clip was drawn."""
        entry = uri, key, reason
        if entry in self._known:
            return
        line = json.dumps({"uri": uri, "key": key, "reason": reason, "message": message, "found": found}) + "\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if the process dies
            self._read_new_lines(file)
            if entry not in self._known:
                file.write(line.encode())
        self._known.add(entry)

    def clear(self) -> None:
        """Removes the list, because the corpus has changed."""
        self.path.unlink(missing_ok=True)
        self._known, self._read = set(), 0

    def clear_clips(self) -> None:
        """Removes what was found when clips were drawn, because others are drawn from now on. Call it with the folder's lock."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_whole(line) and json.loads(line).get("found") == "index"]
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)
        self._known, self._read = set(), 0

    def counts(self) -> dict[str, int]:
        """Number of samples by reason."""
        if not self.path.exists():
            return {}
        with self.path.open("rb") as file:
            self._read_new_lines(file)
        return dict(Counter(reason for _, _, reason in self._known).most_common())

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_known": set(), "_read": 0}

    def _read_new_lines(self, file: IO[bytes]) -> None:
        file.seek(self._read)
        for line in file:
            if not line.endswith(b"\n"):  # incomplete, because its writer died: end it here, and skip it
                if file.writable():
                    file.write(b"\n")
                break
            self._read += len(line)
            if _is_whole(line.decode()):
                entry = json.loads(line)
                self._known.add((entry["uri"], entry["key"], entry["reason"]))


def _is_whole(line: str) -> bool:
    """Whether a writer finished the line."""
    return line.startswith("{") and line.endswith("}\n")

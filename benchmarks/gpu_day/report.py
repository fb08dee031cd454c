"""JSON report of a GPU day, written again after each measurement, so that a run that is cut off still tells what it found.

`{"runs": [...], "sections": {name: {"began", "finished", "entries": [...]}}}`; an entry has `name`, `seconds`, and one of `values`,
`error` or `left_out`. Sections may come from processes one after another: each reads the file and adds its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Report:
    """See the module. `until`: time (`time.monotonic`) after which the section in progress begins no further measurement."""

    def __init__(self, path: Path, until: float) -> None:
        self.path, self.until = path, until
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "sections": {}}
        self.content["runs"].append({"began": _now(), "command": sys.argv[1:]})
        self._section: dict[str, Any] = {}
        self.errors = 0

    def begin(self, section: str) -> None:
        """Begins a section; an earlier one of the same name is replaced."""
        self._section = self.content["sections"][section] = {"began": _now(), "finished": False, "entries": []}
        print(f"== {section}", flush=True)
        self._write()

    def finish(self) -> None:
        """Marks the section as complete: all of its measurements ran, failed or were left out for a reason that is recorded."""
        self._section["finished"] = True
        self._write()

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """Runs a measurement and records what it returns (JSON values), or its error. Returns the values, None after an error.

        Any error is recorded and counted, and the next measurement runs: the machine is at hand for minutes, and there is no second try.
        """
        if time.monotonic() > self.until:
            self.leave_out(name, "the section's time is spent")
            return None
        began = time.perf_counter()
        try:
            values = function()
        except Exception as error:  # noqa: BLE001 - recorded with its traceback; decides the exit code
            self.errors += 1
            self._add(name, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, began)
            return None
        self._add(name, {"values": values}, began)
        return values

    def leave_out(self, name: str, reason: str) -> None:
        """Records that something was not measured, and why."""
        self._add(name, {"left_out": reason}, time.perf_counter())

    def values(self, section: str) -> dict[str, Any]:
        """Values of a section by the names of its measurements; empty if it did not run."""
        entries = self.content["sections"].get(section, {}).get("entries", [])
        return {entry["name"]: entry["values"] for entry in entries if "values" in entry}

    def _add(self, name: str, found: dict[str, Any], began: float) -> None:
        entry = {"name": name, "seconds": round(time.perf_counter() - began, 3), **found}
        self._section["entries"].append(entry)
        self._write()
        shown = {key: value for key, value in found.items() if key != "traceback"}
        print(f"{entry['seconds']:>8.2f} s  {name}: {json.dumps(shown)[:600]}", flush=True)

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        os.replace(partial, self.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

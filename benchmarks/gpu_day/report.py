"""JSON report of a GPU day, written before and after each measurement, so that a run that is cut off still tells what it found.

`{"runs": [...], "sections": {name: {"began", "finished", "in_progress", "entries": [...]}}}`; an entry has `name`, `seconds`, and one of
`values`, `error` or `left_out`. Sections may come from processes one after another: each reads the file and adds its own. A process that
begins a section which another left unfinished goes on after the measurement that was in progress.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path


LATE_S = 8.0  # after the end of its section a measurement is ended


class Unfinished(SystemExit):
    """Ends the process before its section is finished, because nothing more can be measured in it."""

    CODE = 4

    def __init__(self) -> None:
        super().__init__(self.CODE)


class Report:
    """See the module. `until`: time (`time.monotonic`) after which the section in progress begins no further measurement.

    `limit_s`: a measurement that takes longer ends the process, with its stacks on stderr: it hangs. `check_device`: raises where the
    device can no longer be used; called after an error.
    """

    def __init__(
        self, path: Path, until: float, limit_s: float | None = None, check_device: Callable[[], object] | None = None
    ) -> None:
        self.path, self.until = path, until
        self._limit_s, self._check_device = limit_s, check_device
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "sections": {}}
        self.content["runs"].append({"began": _now(), "command": sys.argv[1:]})
        self._section: dict[str, Any] = {}
        self.errors = 0

    def begin(self, section: str) -> None:
        """Begins a section. A finished one of the same name is replaced; one that another process left unfinished goes on."""
        print(f"== {section}", flush=True)
        earlier = self.content["sections"].get(section)
        if earlier is not None and not earlier["finished"]:
            self._section = earlier
            if (hung := earlier["in_progress"]) is not None:
                error = "the process ended during this measurement: it took too long, or crashed; the log says more"
                self._add(hung, {"error": error}, time.perf_counter())
            return
        self._section = {"began": _now(), "finished": False, "in_progress": None, "entries": []}
        self.content["sections"][section] = self._section
        self._write()

    def finish(self) -> None:
        """Marks the section as complete: all of its measurements ran, failed or were left out for a reason that is recorded."""
        self._section["finished"] = True
        self._write()

    def measure(self, name: str, function: Callable[[], Any], *, again: bool = False, slow: bool = False) -> Any:
        """Runs a measurement and records what it returns (JSON values), or its error. Returns the values, None after an error.

        Any error is recorded and counted, and the next measurement runs: the machine is at hand for minutes, and there is no second try.
        What an earlier process recorded is not measured again; `again`: only if it failed, because others need what `function` prepares.
        `slow`: may take all of the section's time.

        Raises:
            Unfinished: the device cannot be used any more in this process.
        """
        known = self._recorded(name)
        if known is not None and not (again and "values" in known):
            return known.get("values")
        if time.monotonic() > self.until:
            self.leave_out(name, "the section's time is spent")
            return None
        self._section["in_progress"] = name
        self._write()
        began = time.perf_counter()
        try:
            with self._time_limit(slow=slow):
                values = function()
        except Exception as error:  # noqa: BLE001 - recorded with its traceback; decides the exit code
            self.errors += 1
            self._add(name, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, began)
            self._end_if_device_is_lost()
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

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that the section in progress has no entry for."""
        return [name for name in names if self._recorded(name) is None]

    def _recorded(self, name: str) -> dict[str, Any] | None:
        return next((entry for entry in self._section["entries"] if entry["name"] == name), None)

    @contextmanager
    def _time_limit(self, *, slow: bool) -> Iterator[None]:
        """A thread in C ends the process (exit code 1): a Python thread cannot while a library that hangs holds the interpreter's lock."""
        if self._limit_s is None:
            yield
            return
        rest = max(1.0, self.until + LATE_S - time.monotonic())
        seconds = rest if slow else min(rest, self._limit_s)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end_if_device_is_lost(self) -> None:
        if self._check_device is None:
            return
        try:
            self._check_device()
        except Exception as error:  # noqa: BLE001 - whatever the device says
            print(f"the device cannot be used any more in this process: {type(error).__name__}: {error}", flush=True)
            raise Unfinished from None

    def _add(self, name: str, found: dict[str, Any], began: float) -> None:
        entry = {"name": name, "seconds": round(time.perf_counter() - began, 3), **found}
        self._section["entries"] = [kept for kept in self._section["entries"] if kept["name"] != name] + [entry]
        self._section["in_progress"] = None
        self._write()
        shown = {key: value for key, value in found.items() if key != "traceback"}
        print(f"{entry['seconds']:>8.2f} s  {name}: {json.dumps(shown)[:600]}", flush=True)

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        os.replace(partial, self.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

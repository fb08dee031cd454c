"""JSON-lines log of one build, stored beside its receipts: `_runs/{build}/0001.jsonl` and so on. Written by a thread.

Takes events with plain values. Object stores cannot append, so the latest part is replaced every `FLUSH_S` until it has `PART_BYTES`; then
the next one begins. A store that is slow or away only delays the log. Beyond `WAITING_BYTES` in memory or `MOST_PARTS` in the store further
lines are dropped, and a line says how many. Fields of each event: docs/formats.md.
"""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import LatheError
from pipeline.format.layout import CURRENT

if TYPE_CHECKING:
    from pipeline.format.layout import Layout
    from pipeline.storage import Store

FLUSH_S = 30.0
FIRST_S = 1.0  # to the second write; doubled until it is `FLUSH_S`
PART_BYTES = 4 * 1024 * 1024
MOST_PARTS = 64
WAITING_BYTES = 16 * 1024 * 1024
CLOSE_S = 5.0  # for the last part to be written


class RunLog:
    """`event` never blocks on the store and never raises its errors; see `failure`. Events come from one thread."""

    def __init__(self, store: Store, build: str, *, layout: Layout = CURRENT, every_s: float = FLUSH_S) -> None:
        self._store = store
        self._build = build
        self._layout = layout
        self._every_s = every_s
        self._guard = threading.Lock()  # of the next three
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._dropped = 0
        self._part = bytearray()  # contents of the latest part; of the thread alone
        self._number = 1
        self._closing = threading.Event()
        self._failure: str | None = None
        self._failure_shown = False
        self._thread: threading.Thread | None = None

    def event(self, name: str, **fields: Any) -> None:
        """Logs an event now. Fields have to be JSON-ready."""
        line = _line(name, fields)
        with self._guard:
            if self._waiting_bytes + len(line) > WAITING_BYTES and name != "ended":
                self._dropped += 1
                return
            self._waiting.append(line)
            self._waiting_bytes += len(line)
        if self._thread is None:
            # A daemon thread: a store that hangs must not keep the process alive.
            self._thread = threading.Thread(target=self._write, name="run-log", daemon=True)
            self._thread.start()

    def failure(self) -> str | None:
        """Why the log could not be written; returned once a build."""
        if self._failure is None or self._failure_shown:
            return None
        self._failure_shown = True
        return f"the run log of build {self._build} could not be written and is tried again: {self._failure}"

    def close(self) -> None:
        """Writes what waits. Returns after `CLOSE_S` at the latest."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _write(self) -> None:
        pause_s = FIRST_S
        while True:
            last = self._closing.is_set()
            if not self._flush():
                pause_s = FIRST_S  # the part is in memory and complete: the next turn writes it again
            if last:
                return
            self._closing.wait(min(pause_s, self._every_s))
            pause_s = min(2 * pause_s, self._every_s)

    def _flush(self) -> bool:
        """Writes the waiting lines. False: the store refused, or does not answer."""
        while True:
            self._take()
            key = self._layout.run_log_key(self._build, self._number)
            try:
                if self._part:
                    self._store.write(key, bytes(self._part))
            except LatheError as error:
                self._failure = str(error)
                return False
            if len(self._part) >= PART_BYTES and self._number < MOST_PARTS:
                self._part.clear()
                self._number += 1
            with self._guard:
                if not self._waiting or self._full:
                    return True

    @property
    def _full(self) -> bool:
        return self._number == MOST_PARTS and len(self._part) >= PART_BYTES

    def _take(self) -> None:
        """Moves waiting lines into the part until it is full. The end of a build is logged in any case."""
        with self._guard:
            taken = 0
            for line in self._waiting:
                if len(self._part) < PART_BYTES:
                    self._part += line
                elif self._number < MOST_PARTS:
                    break
                elif b'"event": "ended"' in line:
                    self._part += _line("dropped", {"lines": self._dropped}) + line
                    self._dropped = 0
                else:
                    self._dropped += 1
                self._waiting_bytes -= len(line)
                taken += 1
            del self._waiting[:taken]
            if self._dropped and not self._waiting and len(self._part) < PART_BYTES:
                self._part += _line("dropped", {"lines": self._dropped})
                self._dropped = 0


def _line(name: str, fields: dict[str, Any]) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"ts": now, "event": name, **fields}, default=str).encode() + b"\n"

"""Thread that writes `_progress/{build id}.json` to the output while a build runs, for `lathe status` on other machines.

Takes the latest numbers at any rate. The object is replaced every `HEARTBEAT_S`, at first more often, and removed at the end. A store that
is slow or away only delays it. Objects of killed builds are removed when they are a day old.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from pipeline.errors import LatheError
from pipeline.format.layout import CURRENT

if TYPE_CHECKING:
    from pipeline.format.layout import Layout
    from pipeline.storage import Store

HEARTBEAT_S = 30.0
FIRST_S = 1.0  # to the second write; doubled until it is `HEARTBEAT_S`, so that a new build is soon seen to work
STALE_S = 24 * 3600.0
CLOSE_S = 5.0  # for the last write to end and the object to be removed


def build_name(token: str) -> str:
    """Name of a build that starts now, which sorts by time: `20260131T235959Z-{token}`."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{token}"


class Heartbeat:
    """`offer` never blocks and never raises."""

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        layout: Layout = CURRENT,
        every_s: float = HEARTBEAT_S,
        build: str | None = None,
    ) -> None:
        """`build`: its name; a new one by default."""
        started = time.time()
        self.build = build or build_name(secrets.token_hex(4))
        self.key = layout.progress_key(self.build)
        self._prefix = layout.progress
        self._store = store
        self._every_s = every_s
        self._facts = {
            "build": self.build,
            "running": True,
            "started": started,
            "every_s": every_s,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "fingerprint": fingerprint,
        }
        self._latest: dict[str, Any] | None = None
        self._offered = threading.Event()
        self._closing = threading.Event()
        self._failure: str | None = None
        self._failure_shown = False
        self._thread: threading.Thread | None = None

    def offer(self, values: dict[str, Any]) -> None:
        """Takes the present numbers. Of several between two writes the last is written."""
        self._latest = {"updated": time.time(), **values}
        self._offered.set()
        if self._thread is None:
            # A daemon thread: a store that hangs must not keep the process alive.
            self._thread = threading.Thread(target=self._write, name="heartbeat", daemon=True)
            self._thread.start()

    def failure(self) -> str | None:
        """Why the object could not be written; returned once a build."""
        if self._failure is None or self._failure_shown:
            return None
        self._failure_shown = True
        return f"{self.key} could not be written, so `lathe status` does not see this build: {self._failure}"

    def close(self) -> None:
        """Removes the object. Returns after `CLOSE_S` at the latest; then the object stays, and its `updated` shows that it is old."""
        self._closing.set()
        self._offered.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _write(self) -> None:
        written, pause_s = False, FIRST_S
        while not self._closing.is_set():
            self._offered.wait()
            self._offered.clear()
            if self._closing.is_set():
                break
            if self._attempt(lambda: self._store.write(self.key, self._encoded())) and not written:
                written = True
                self._attempt(self._sweep)
            self._closing.wait(min(pause_s, self._every_s))
            pause_s *= 2
        if written:
            self._attempt(lambda: self._store.delete(self.key))

    def _encoded(self) -> bytes:
        return json.dumps({**self._facts, **(self._latest or {})}, indent=1).encode()

    def _attempt(self, call: Any) -> bool:
        try:
            call()
        except LatheError as error:
            self._failure = str(error)
            return False
        return True

    def _sweep(self) -> None:
        for info in list(self._store.list(self._prefix)):
            if info.modified < time.time() - STALE_S:
                self._store.delete(info.key)

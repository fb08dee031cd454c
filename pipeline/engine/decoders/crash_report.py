"""File with the cause of a crash in native code, for a parent that cannot see the exit status of the process (workers of Ray).

The process that may crash makes a `CrashReport`; `faulthandler` writes to it on SIGSEGV, SIGABRT, SIGBUS, SIGFPE and SIGILL. Once the
process is gone, `take_report` on the same machine reads it. An empty report means that the process was ended from outside.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import tempfile
import time
from pathlib import Path

from pipeline.video.decode import read_mark

PREFIX = "lathe-crash-"
REPORT_BYTES = 4096  # the cause is in the first line
KEPT_S = 300.0  # a report that was not taken: its encoder is gone as well


class CrashReport:
    """Enables the report for this process until it ends. `path` is the report's file, `mark_path` the file of the process's `read_mark`."""

    def __init__(self) -> None:
        _sweep()
        descriptor, self.path = tempfile.mkstemp(prefix=PREFIX)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until the process ends: see `_sweep`
        self._file = os.fdopen(descriptor, "wb")
        faulthandler.enable(self._file, all_threads=False)
        self.mark_path = f"{self.path}-mark"  # swept like the report
        self.mark = os.open(self.mark_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.mark, fcntl.LOCK_EX)
        read_mark.prepare(self.mark)


def take_report(path: str) -> str:
    """The report at `path`, empty if the process did not crash or the file is gone. Deletes the file."""
    try:
        with open(path, "rb") as file:
            report = file.read(REPORT_BYTES)
        os.unlink(path)
        os.unlink(f"{path}-mark")
    except OSError:
        return ""
    return report.decode(errors="replace")


def _sweep() -> None:
    """Deletes old reports of this user whose process is gone: their lock is free."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process deleted it first, or its process lives (the lock is taken)
            found = path.stat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < KEPT_S:
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

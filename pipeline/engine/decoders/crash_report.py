"""A file in which a process that crashes in native code leaves why, for a parent that cannot see its exit status (Ray's workers).

`CrashReport` in the process that may crash: `faulthandler` writes there on SIGSEGV, SIGABRT, SIGBUS, SIGFPE and SIGILL. `take_report` on
the same machine, once the process is gone: an empty answer says that it did not crash, so that something outside ended it.
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
KEPT_S = 300.0  # a report that was not asked for: its encoder is gone too


class CrashReport:
    """Switches reporting on for this process, until it ends. `path`: where the report will be; `mark_path`: of its `read_mark`."""

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
    """What the process left at `path`, empty if it did not crash or the file is gone. Deletes the file."""
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
        with contextlib.suppress(OSError):  # another process was first, or its process lives (the lock is taken)
            found = path.stat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < KEPT_S:
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

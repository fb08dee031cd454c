"""A temporary folder that does not outlive its process: locked while it is used, deleted when closed, and if its process was killed, by
the next one on the machine.

Enters: nothing. Leaves: the path of an empty folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from contextlib import suppress

PREFIX = "lathe-scratch-"
LOCK = ".lock"


class ScratchFolder:
    """Made at once; `close` deletes it with all that is in it. `path` is absolute."""

    def __init__(self) -> None:
        _sweep()
        # Locked before it gets the name that sweepers look for.
        made = tempfile.mkdtemp(prefix=f".{PREFIX}")
        self._lock = os.open(os.path.join(made, LOCK), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = os.path.join(os.path.dirname(made), PREFIX + uuid.uuid4().hex)
        os.rename(made, self.path)
        self._closed = False

    def close(self) -> None:
        """Deletes the folder; a second call does nothing."""
        if not self._closed:
            self._closed = True
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _sweep() -> None:
    """Deletes folders of this user whose process is gone: their lock is free."""
    for entry in os.scandir(tempfile.gettempdir()):
        if not entry.name.startswith(PREFIX) or entry.is_symlink() or not entry.is_dir():
            continue
        with suppress(FileNotFoundError):  # somebody else was first
            if entry.stat().st_uid != os.getuid():
                continue
            lock = os.open(os.path.join(entry.path, LOCK), os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            except BlockingIOError:  # its process lives
                continue
            finally:
                os.close(lock)

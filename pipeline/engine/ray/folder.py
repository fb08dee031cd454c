"""Temporary folder of a private Ray's sessions. Its path is short enough for sockets; it is locked while its driver lives.

It is deleted at the end. The folder of a killed driver is deleted by the next driver on the machine, because its lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from contextlib import suppress

from pipeline.errors import BuildError
from pipeline.units import size

MiB = 1024 * 1024
PREFIX = "lathe-ray-"
LOCK = ".lock"
SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
BELOW = len("/session_2026-11-28_10-56-08_724937_4194304/sockets/plasma_store")  # what Ray appends
ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")  # where TMPDIR is too long
LEAST_FREE = 16 * MiB  # Ray's logs and sockets of one session
REMOVE_S = 5.0  # Ray's processes may still write for a moment


class RayFolder:
    """Makes the folder. Raises BuildError if no folder with a short path is writable and has space."""

    def __init__(self) -> None:
        self.path = ""
        refused = []
        for parent in _parents():
            try:
                _sweep(parent)
                self._make(parent)
            except OSError as error:
                refused.append(f"{parent}: {error.strerror or error}")
                continue
            if self.free_bytes >= LEAST_FREE:
                return
            refused.append(f"{parent}: {size(self.free_bytes)} free")
            self.close()
            break  # the user's temporary folder is full: an error, not a reason to use another disk
        raise BuildError(
            f"a private Ray needs a temporary folder with {size(LEAST_FREE)} free and a path of at most {_longest_parent()} bytes; tried "
            f"{'; '.join(refused)}; free space there, set TMPDIR, or use --executor inline"
        )

    @property
    def free_bytes(self) -> int:
        """Free bytes on its disk."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """Deletes the folder; a second call does nothing."""
        deadline = time.monotonic() + REMOVE_S
        while self.path and os.path.exists(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if self.path:
            os.close(self._lock)
        self.path = ""

    def _make(self, parent: str) -> None:
        # Locked before it gets the name that `_sweep` looks for.
        made = tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent)
        try:
            lock = os.open(os.path.join(made, LOCK), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = os.path.join(parent, PREFIX + uuid.uuid4().hex[:8])
            os.rename(made, path)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        self._lock, self.path = lock, path


def _longest_parent() -> int:
    return SOCKET_PATH - BELOW - len(f"/{PREFIX}12345678")


def _parents() -> list[str]:
    """Possible parents: the user's temporary folder, then `ELSEWHERE`, without those whose path is too long."""
    try:
        wanted = [os.path.abspath(tempfile.gettempdir())]
    except OSError:  # tempfile found none that is writable; `ELSEWHERE` is tried, and named in the error
        wanted = []
    return [parent for parent in dict.fromkeys([*wanted, *ELSEWHERE]) if len(os.fsencode(parent)) <= _longest_parent()]


def _sweep(parent: str) -> None:
    """Deletes folders of this user whose driver is gone."""
    for entry in os.scandir(parent):
        if not entry.name.startswith(PREFIX) or entry.is_symlink() or not entry.is_dir():
            continue
        with suppress(FileNotFoundError):  # another process deleted it first
            if entry.stat().st_uid != os.getuid():
                continue
            lock = os.open(os.path.join(entry.path, LOCK), os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            except BlockingIOError:  # its driver lives
                continue
            finally:
                os.close(lock)

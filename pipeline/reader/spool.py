"""Where encoded videos wait for their decoder: in memory while small, in temporary files when large.

Enters: pieces of bytes and their size. Leaves: bytes, or the path of a file that lives until it is dropped. The folder is locked while its
process lives; what a killed process left behind is deleted by the next one on the machine.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
import threading
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "lathe-videos-"
LOCK = ".lock"


class Spool:
    """Files in one temporary folder, made when the first is needed. Safe to use from several threads."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._guard = threading.Lock()
        self._folder: str | None = None
        self._lock: int | None = None
        self._closed = False

    def hold(self, pieces: Iterable[bytes], size: int) -> bytes | str:
        """Bytes up to `memory_bytes`, else the path of a file with them.

        Raises:
            ValueError: the spool is closed.
        """
        if size <= self._memory_bytes:
            held = io.BytesIO()
            held.writelines(pieces)
            return held.getvalue()  # shares its buffer: a join would hold every byte twice
        path = os.path.join(self._open(), uuid.uuid4().hex)
        try:
            with open(path, "xb") as file:
                file.writelines(pieces)
        except BaseException:
            self.drop(path)
            raise
        return path

    def drop(self, path: str) -> None:
        """Deletes a file that was made here; any other path is left alone."""
        if self._folder is not None and os.path.dirname(path) == self._folder:
            with suppress(FileNotFoundError):  # somebody else was first
                os.unlink(path)

    def close(self) -> None:
        """Deletes the folder."""
        with self._guard:
            self._closed = True
            folder, self._folder = self._folder, None
            lock, self._lock = self._lock, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)

    def _open(self) -> str:
        with self._guard:
            if self._closed:
                raise ValueError("the spool is closed")
            if self._folder is None:
                _sweep()
                # Locked before it gets the name that sweepers look for.
                made = tempfile.mkdtemp(prefix=f".{PREFIX}")
                self._lock = os.open(os.path.join(made, LOCK), os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self._folder = os.path.join(os.path.dirname(made), PREFIX + uuid.uuid4().hex)
                os.rename(made, self._folder)
            return self._folder


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

"""Temporary folders below `TMPDIR`, locked while in use and removed on close, or by the next process if this one was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "lathe-scratch-"
LOCK = ".lock"


@contextmanager
def local_disk(folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Turns an `OSError` of local temporary files into `StorageUnavailable`: another try, perhaps on another machine, may succeed."""
    try:
        yield
    except OSError as error:
        where = os.fspath(folder) if folder is not None else tempfile.tempdir or "of this machine"
        reason = error.strerror or str(error)
        raise StorageUnavailable(
            f"temporary folder {where} cannot be written: {reason}; free space there, or set TMPDIR to another folder"
        ) from error


class ScratchFolder:
    """An empty folder at `path` (absolute); `close`, or the end of a `with` block, deletes it with its contents.

    Raises:
        StorageUnavailable: it cannot be created; the message names the folder above it and the cause.
    """

    def __init__(self) -> None:
        with local_disk():
            self._make()

    def _make(self) -> None:
        _sweep()
        # Locked before it gets the name by which `_sweep` finds it.
        made = tempfile.mkdtemp(prefix=f".{PREFIX}")
        try:
            self._lock = os.open(os.path.join(made, LOCK), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.path = os.path.join(os.path.dirname(made), PREFIX + uuid.uuid4().hex)
            os.rename(made, self.path)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        self._closed = False

    def __enter__(self) -> Path:
        return Path(self.path)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Deletes the folder; a second call does nothing."""
        if not self._closed:
            self._closed = True
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _sweep() -> None:
    """Deletes folders of this user whose process has ended: their lock is free. Skips folders that it may not read."""
    # Not required: a temporary folder that cannot be listed (mode 1733) can still be used.
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith(PREFIX):
                with suppress(OSError):  # another process was first, or the folder may not be read
                    _sweep_one(entry)


def _sweep_one(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink() or not entry.is_dir() or entry.stat().st_uid != os.getuid():
        return
    lock = os.open(os.path.join(entry.path, LOCK), os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process is alive
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)

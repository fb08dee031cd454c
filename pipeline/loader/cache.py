"""Local copies of tensors, named by their hash, within a number of bytes. Several processes of a machine may share the folder.

A file appears complete or not at all. The one that was read longest ago goes first. Nothing is lost if the folder is deleted at any time.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = ".lock"  # held by the process that removes files
BYTES = ".bytes"  # of all files together, or more, as text; locked while it is changed
SCRATCH = ".writing-"
SCRATCH_S = 3600  # a file that is written for so long was left by a process that was killed
TOUCH_S = 60  # between notes that a file was read
FILLED = 0.9  # fraction of the budget that trimming leaves
FOLDER, FILE = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{32}")  # names of ours; others are left alone
UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


class TensorCache:
    """`folder` on a local disk, `budget` in bytes or as `200GB`. Safe for several threads and processes."""

    def __init__(self, folder: str | Path, budget: int | str) -> None:
        self._folder = os.path.abspath(folder)
        self._budget = parse_bytes(budget)
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._trim()
        except OSError as error:
            raise ConfigError(f"cache: {self._folder} cannot be used: {error.strerror}; name another folder") from error

    def read(self, name: str, view: memoryview) -> bool:
        """Fills `view` with the tensor of this hash; False if it is not here."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            found = os.fstat(descriptor)
            if found.st_size != len(view) or not _read_whole(descriptor, view):
                return False
            if time.time() - found.st_mtime > TOUCH_S:
                with suppress(OSError):
                    os.utime(descriptor)
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def put(self, name: str, view: memoryview) -> None:
        """Keeps a copy of a tensor, if there is space. A full or failing disk is no error: the store has the tensor."""
        if len(view) > self._budget * FILLED:
            return
        path = self._path(name)
        scratch = os.path.join(self._folder, f"{SCRATCH}{uuid.uuid4().hex}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # first: the folder may have been deleted
            if not self._reserve(len(view)):
                self._trim()
                if not self._reserve(len(view)):
                    return
            with open(scratch, "xb", buffering=0) as file:
                at = 0
                while at < len(view):
                    at += file.write(view[at:])
            os.replace(scratch, path)
        except OSError:
            with suppress(OSError):
                os.unlink(scratch)

    def forget(self, name: str) -> None:
        """Removes a copy."""
        with suppress(OSError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name[:2], name)

    def _reserve(self, size: int) -> bool:
        """Counts `size` more bytes of all processes together; False if they exceed the budget."""
        with self._count() as count:
            if count.value + size > self._budget:
                return False
            count.value += size
            return True

    def _trim(self) -> None:
        """Removes the files that were read longest ago while all together exceed the budget. One process or thread at a time."""
        with self._alone() as alone:
            if not alone:
                return
            with self._count() as count:
                before = count.value
            files = sorted(self._files())
            held = sum(size for _, size, _ in files)
            for _, size, path in files:
                if held <= self._budget * FILLED:
                    break
                with suppress(OSError):
                    os.unlink(path)
                held -= size
            with (
                self._count() as count
            ):  # what was added meanwhile may be among the files: rather too much than too little
                count.value = held + max(0, count.value - before)

    @contextmanager
    def _count(self) -> Iterator[_Count]:
        """The number of bytes in `BYTES`, written back at the end; other processes and threads wait."""
        descriptor = os.open(os.path.join(self._folder, BYTES), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 20, 0)
            count = _Count(int(text) if text.isdigit() else self._budget)  # unknown: trimming counts
            yield count
            os.pwrite(descriptor, b"%020d" % count.value, 0)
        finally:
            os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process or thread trims."""
        descriptor = os.open(os.path.join(self._folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of the last read, size and path of every copy; removes what killed processes left."""
        for entry in os.scandir(self._folder):
            if entry.name.startswith(SCRATCH):
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > SCRATCH_S:
                        os.unlink(entry.path)
            elif FOLDER.fullmatch(entry.name):
                with suppress(OSError):  # not a folder, or removed meanwhile
                    for file in os.scandir(entry.path):
                        if FILE.fullmatch(file.name):
                            with suppress(OSError):
                                found = file.stat()
                                yield found.st_mtime, found.st_size, file.path


@dataclass(slots=True)
class _Count:
    value: int


def parse_bytes(text: int | str) -> int:
    """`200GB`, `64 MiB` or a number.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in UNITS or (found := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise ConfigError(f"cache: expected a number of bytes such as 200GB, got {text!r}")
    return found


def _read_whole(descriptor: int, view: memoryview) -> bool:
    done = 0
    while done < len(view):
        if not (found := os.preadv(descriptor, [view[done:]], done)):
            return False
        done += found
    return True

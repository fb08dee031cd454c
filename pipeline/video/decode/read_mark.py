"""Shared byte in which a decoder process records for its owner whether it is reading its video's file. Part of the decode package.

A mount that hangs stops a decoder in a read, a hostile video stops it in the codec; only the second is the video's fault. The decoder
writes the byte twice a read. The owner may be another process of the same machine.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_mark: mmap.mmap | bytearray = bytearray(1)  # not shared with another process


def prepare(descriptor: int) -> None:
    """Prepares an empty file for `share`. The byte is written, not only reserved: writing into a hole on a full disk is a SIGBUS."""
    os.write(descriptor, b"\0")


def share(descriptor: int) -> None:
    """From now on this process marks its reads in a file that `prepare` made."""
    global _mark
    _mark = mmap.mmap(descriptor, 1)


def look(descriptor: int) -> mmap.mmap:
    """The byte in a file that `prepare` made: 1 inside a read, else 0."""
    return mmap.mmap(descriptor, 1, access=mmap.ACCESS_READ)


class Reading:
    """Context of code that may wait for the mount of a video. Must not be nested."""

    def __enter__(self) -> None:
        _mark[0] = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mark[0] = 0


READING = Reading()

"""A byte that a decoder process shares with its owner: whether it is inside a read of its video's file right now.

A mount that hangs stops a decoder in a read, a hostile video in the codec; only the second is the video's fault. The byte is written by
the decoder's thread that reads (two stores a read) and read by the owner, which may be another process of the same machine. Part of the
decode package.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_mark: mmap.mmap | bytearray = bytearray(1)  # not shared with another process


def prepare(descriptor: int) -> None:
    """Makes an empty file one that can be shared. Written, not only sized: a store into a hole of a full disk is a SIGBUS."""
    os.write(descriptor, b"\0")


def share(descriptor: int) -> None:
    """This process marks its reads in a file that `prepare` made, from now on."""
    global _mark
    _mark = mmap.mmap(descriptor, 1)


def look(descriptor: int) -> mmap.mmap:
    """The byte in a file that `prepare` made: 1 inside a read, else 0."""
    return mmap.mmap(descriptor, 1, access=mmap.ACCESS_READ)


class Reading:
    """Marks what runs inside: it may wait for the mount below a video. Not to be nested."""

    def __enter__(self) -> None:
        _mark[0] = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mark[0] = 0


READING = Reading()

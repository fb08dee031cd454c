"""Readers of byte ranges of one object into memory of the caller, for many small reads of the same object from several threads."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, ClassVar

from pipeline.storage.batched_reads import BatchedReads, Read
from pipeline.storage.local_errors import translated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.storage import Store

MOST_BUFFERS = 1024  # of one preadv (IOV_MAX of Linux)


class RangeReader:
    """Reader of an object of any store: one ranged request a call, copied once. Holds no connection."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key

    def read_into(self, start: int, buffers: Sequence[memoryview]) -> int:
        """Fills `buffers` (bytes, writable) one after another from offset `start`. Returns the bytes read, fewer only at the end.

        Raises as `Store.read_range`.
        """
        data = memoryview(self._store.read_range(self._key, start, sum(map(len, buffers))))
        at = 0
        for buffer in buffers:
            piece = data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return len(data)


class LocalRangeReader(RangeReader):
    """Reader of a local file by `preadv`, without a copy. Keeps the file open.

    The file is closed when the last reference to the reader is gone, hence never under a read: the kernel gives its number to the next
    file that is opened, and the read would return bytes of that one.
    """

    _batched: ClassVar[BatchedReads] = BatchedReads()

    def __init__(self, store: Store, key: str) -> None:
        super().__init__(store, key)
        self._path = store.uri(key)
        with translated(self._path):
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        # Not `__del__`, which may run when the interpreter has already taken `os` apart.
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def read_into(self, start: int, buffers: Sequence[memoryview]) -> int:
        """As `RangeReader.read_into`."""
        try:
            done = os.preadv(self._descriptor, buffers[:MOST_BUFFERS], start)
            if len(buffers) == 1 and done == len(buffers[0]):
                return done
            while (left := _after(buffers, done)) and (
                found := os.preadv(self._descriptor, left[:MOST_BUFFERS], start + done)
            ):
                done += found
        except OSError:
            with translated(self._path):
                raise
        return done


def read_together(reads: Sequence[tuple[RangeReader, int, Sequence[memoryview]]]) -> list[bool]:
    """Readers with arguments of `read_into`. Which of them were read in full, those of local files at once; others need `read_into`."""
    local = [
        Read(reader._descriptor, start, buffers)
        for reader, start, buffers in reads
        if isinstance(reader, LocalRangeReader)
    ]
    return LocalRangeReader._batched.read(local) if len(local) == len(reads) else [False] * len(reads)


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` after `done` bytes."""
    left = []
    for buffer in buffers:
        length = len(buffer)
        if done < length:
            left.append(buffer[done:])
            done = 0
        else:
            done -= length
    return left

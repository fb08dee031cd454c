"""Several `preadv` of local files in one system call, Linux's `io_submit`: between reads no thread waits for the interpreter.

A thread that comes back from `preadv` must get the interpreter's lock, for up to five milliseconds if training runs Python meanwhile; for
the 16 tensors of a batch that is 16 times, and twice with one call that begins all and one that waits for them. Of a file that is read
through the page cache the kernel has copied everything when the first returns, in the same thread and in order. Where the kernel does not
offer it (other systems, a container's filter, too many contexts) nothing is read here, and the caller reads one after another.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_READS, MOST_BUFFERS = 32, 512  # of one call
PREAD, PREADV = 0, 7  # IOCB_CMD_*
IOCB = struct.Struct("<QIIHhIQQqQII")  # struct iocb of linux/aio_abi.h
EVENT = struct.Struct("<QQqq")  # struct io_event
IOVEC = struct.Struct("<QQ")


class _Calls(NamedTuple):
    """Numbers of the system calls."""

    setup: int
    destroy: int
    submit: int
    getevents: int


_CALLS = {"x86_64": _Calls(206, 207, 209, 208), "aarch64": _Calls(0, 1, 2, 4)}


# File descriptor, offset in the file, and memory to be filled with what follows there, one after another (writable).
Read = tuple[int, int, "Sequence[memoryview]"]


class BatchedReads:
    """Reads for any number of threads; each has a context of the kernel, which goes with the thread."""

    def __init__(self) -> None:
        # A 32-bit Python on a 64-bit machine makes other system calls under these numbers.
        known = sys.platform == "linux" and sys.maxsize > 2**32
        self._calls = _CALLS.get(platform.machine()) if known else None
        self._of_thread = threading.local()

    def read(self, reads: Sequence[Read]) -> list[bool]:
        """Whether each was read in full. Others are to be made one by one, which says why: they failed, ended early or were not begun."""
        fits = 1 < len(reads) <= MOST_READS and sum([len(buffers) for _, _, buffers in reads]) <= MOST_BUFFERS
        context = self._context() if fits and self._calls is not None else None
        if context is not None:
            try:
                return context.read(reads)
            except OSError:  # the results are refused, by a container's filter: for good
                self._calls = None
        return [False] * len(reads)

    def _context(self) -> _Context | None:
        own = self._of_thread
        if getattr(own, "process", None) != os.getpid():  # a forked process has none of the contexts of its parent
            own.process, own.context = os.getpid(), _Context.made(self._calls)
        elif own.context is not None and not own.context.is_open:
            own.context = _Context.made(self._calls)
        found: _Context | None = own.context
        return found


class _Context:
    """A context of the kernel, with memory for what is submitted. For one thread at a time."""

    def __init__(self, number: int, calls: _Calls, system: Any) -> None:
        self._number, self._calls, self._system = ctypes.c_ulong(number), calls, system
        self._blocks = ctypes.create_string_buffer(IOCB.size * MOST_READS)
        self._events = ctypes.create_string_buffer(EVENT.size * MOST_READS)
        self._vectors = ctypes.create_string_buffer(IOVEC.size * MOST_BUFFERS)
        self._first_vector, first = ctypes.addressof(self._vectors), ctypes.addressof(self._blocks)
        self._pointers = (ctypes.c_void_p * MOST_READS)(*range(first, first + len(self._blocks), IOCB.size))
        self._submitted = 0  # reads so far, rounded up to whole calls: numbers of the reads of a call begin there
        self._close = weakref.finalize(self, _destroy, system, calls, number, os.getpid())
        self._close.atexit = False

    @classmethod
    def made(cls, calls: _Calls | None) -> _Context | None:
        """A new one; None if the kernel does not give any."""
        if calls is None:
            return None
        system = ctypes.CDLL(None, use_errno=True).syscall
        system.restype = ctypes.c_long
        number = ctypes.c_ulong(0)
        if system(ctypes.c_long(calls.setup), ctypes.c_long(MOST_READS), ctypes.byref(number)) != 0:
            return None
        return cls(number.value, calls, system)

    @property
    def is_open(self) -> bool:
        """Whether it can be used. A call that was interrupted by an exception, as by Ctrl-C, ends it."""
        return self._close.alive

    def read(self, reads: Sequence[Read]) -> list[bool]:
        """As `BatchedReads.read`. Raises OSError, with the context closed, where the kernel does not give the results."""
        try:
            wanted = self._prepared(reads)
            return self._done(wanted, self._call(self._calls.submit, len(reads), self._pointers))
        except BaseException:
            self._close()  # waits for reads under way, whose memory the caller may give back
            raise

    def _prepared(self, reads: Sequence[Read]) -> list[int]:
        """Fills what is submitted. Returns the bytes of each read."""
        wanted, at = [], 0
        self._submitted += MOST_READS
        for number, (descriptor, start, buffers) in enumerate(reads):
            if len(buffers) == 1:
                operation, place, size = PREAD, _address(buffers[0]), len(buffers[0])
                wanted.append(size)
            else:
                operation, place, size = PREADV, self._first_vector + at * IOVEC.size, len(buffers)
                wanted.append(sum(map(len, buffers)))
                for buffer in buffers:
                    IOVEC.pack_into(self._vectors, at * IOVEC.size, _address(buffer), len(buffer))
                    at += 1
            fields = self._submitted + number, 0, 0, operation, 0, descriptor, place, size, start, 0, 0, 0
            IOCB.pack_into(self._blocks, number * IOCB.size, *fields)
        return wanted

    def _done(self, wanted: list[int], begun: int) -> list[bool]:
        """Waits for the reads that were begun: -1 or fewer than all if the kernel refused one."""
        found, waiting = [False] * len(wanted), max(0, begun)
        while waiting:
            got = self._call(self._calls.getevents, waiting, waiting, self._events, None)
            if got < 0 and ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), "io_getevents failed")
            for number, _, result, _ in EVENT.iter_unpack(self._events.raw[: max(0, got) * EVENT.size]):
                place = number - self._submitted
                found[place] = result == wanted[place]
            waiting -= max(0, got)
        return found

    def _call(self, number: int, *arguments: object) -> int:
        longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
        found: int = self._system(ctypes.c_long(number), self._number, *longs)
        return found


def _address(buffer: memoryview) -> int:
    if not buffer:  # which has no address
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _destroy(system: Any, calls: _Calls, number: int, process: int) -> None:
    if os.getpid() == process:
        system(ctypes.c_long(calls.destroy), ctypes.c_ulong(number))

"""Threads of a loader: those that make batches ahead of the step that training takes, and those that read for them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, ClassVar

from pipeline.errors import ConfigError
from pipeline.loader.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.loader.batch import Batch


class ReadAhead:
    """Batches of the next `depth` steps, of which `at_once` are made at a time. `reads`: threads for reading.

    `stopped`: set when what is under way is not needed any more. Threads of batches wait for threads that read, so these are others.
    """

    _living: ClassVar[weakref.WeakSet[ReadAhead]] = weakref.WeakSet()

    def __init__(self, depth: int, threads: int, at_once: int) -> None:
        self._depth = depth
        self.stopped = threading.Event()
        self.reads = Threads(threads, "latents", self.stopped)
        self._plans = Threads(at_once, "batches", self.stopped)
        self._process: int | None = None  # which started the threads
        self._ahead: deque[tuple[int, Future[Batch | None]]] = deque()
        self._lock = threading.RLock()  # of `_ahead`: another thread may stop it
        self._living.add(self)

    def check(self) -> None:
        """Call before threads are used.

        Raises:
            ConfigError: after `stop`, or in a process that was forked since they were started: it does not have them.
        """
        if self.stopped.is_set():
            raise ConfigError("this loader was closed; make another one, load_state_dict() goes on where it was")
        if self._process not in (None, os.getpid()):
            raise ConfigError(
                f"this loader reads in threads of process {self._process}, which process {os.getpid()} does not have; make a loader in "
                "the process that iterates (in a DataLoader: num_workers=0)"
            )
        self._process = os.getpid()

    def take(self, step: int, make: Callable[[int], Batch | None]) -> Batch | None:
        """The batch that `make` gives for a step, None after the end. Raises as `make`; the next call tries the step again.

        Raises CancelledError if another thread stops it meanwhile.

        `make` is not kept: a loader that is dropped without `close` goes at once, with its memory and threads.
        """
        self.check()
        with self._lock:
            if self._ahead and self._ahead[0][0] != step:
                self.clear()
            following = self._ahead[-1][0] + 1 if self._ahead else step
            for number in range(following, step + self._depth):
                self._submit(number, make)
            first = self._ahead[0][1]
        try:
            batch = first.result()
        except BaseException:
            self.clear()
            raise
        with self._lock:
            if self.stopped.is_set():
                raise CancelledError
            self._ahead.popleft()
            if batch is None:
                self.clear()
            else:
                self._submit(step + self._depth, make)
        return batch

    def clear(self) -> None:
        """Drops what was made ahead."""
        with self._lock:
            while self._ahead:
                self._ahead.popleft()[1].cancel()

    def stop(self) -> None:
        """Leaves out all that has not begun."""
        self.stopped.set()
        self.clear()
        self._plans.shutdown(wait=False, cancel_futures=True)
        self.reads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stops, and waits for reads under way."""
        self.stop()
        self._plans.shutdown()
        self.reads.shutdown()

    def _submit(self, step: int, make: Callable[[int], Batch | None]) -> None:
        if self.stopped.is_set():
            raise CancelledError
        self._ahead.append((step, self._plans.submit(make, step)))


def _stop_all() -> None:
    for one in list(ReadAhead._living):
        # A forked process has the locks of its parent's loaders, not the threads that hold them.
        if one._process == os.getpid():
            one.stop()


# The interpreter waits for the threads of executors before it calls what `atexit` has: without this for everything that was to be read.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_stop_all)

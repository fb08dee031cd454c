"""Threads of a loader and of what opens a dataset, whose waits for a store end when they are stopped."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.storage.patience import end_pauses_at

if TYPE_CHECKING:
    from collections.abc import Iterator


class Threads(ThreadPoolExecutor):
    """Executor that ends with an event: when `stopped` is set, what waits for a store ends, and what is submitted raises CancelledError."""

    def __init__(self, count: int, name: str, stopped: threading.Event) -> None:
        super().__init__(count, thread_name_prefix=name, initializer=end_pauses_at, initargs=(stopped,))
        self._stopped = stopped

    def submit(self, *call: Any, **options: Any) -> Future[Any]:
        """As that of any executor. Raises CancelledError after it was stopped."""
        try:
            return super().submit(*call, **options)
        except RuntimeError:
            if self._stopped.is_set():
                raise CancelledError from None
            raise


@contextmanager
def threads(count: int, name: str) -> Iterator[Threads]:
    """Threads for one block. An error or Ctrl-C in the block ends their waits, so that it is raised at once."""
    stopped = threading.Event()
    pool = Threads(count, name, stopped)
    try:
        yield pool
    except BaseException:
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=stopped.is_set())

"""Calls of one function on many items by threads, a bounded number ahead of the caller; results in order."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pipeline.storage.patience import end_of_pauses, end_pauses_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped_ahead(call: Callable[[Item], Result], items: Iterable[Item], workers: int, name: str) -> Iterator[Result]:
    """`call(item)` of each item, in order. At most `4 * workers` results wait. An error is raised where its result would be. Pauses of the
    threads end with those of the caller (`end_pauses_at`).

    With one worker the caller's thread does it: small local files are read faster than they are handed from thread to thread.
    """
    if workers == 1:
        yield from map(call, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=end_pauses_at, initargs=(end_of_pauses(),))
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Retries of a request: `Patience` waits between its tries, `mark_reached` records for this process that an endpoint has answered."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # registers its join of worker threads; ours is registered later and runs before it
import random
import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from pipeline.process.fork_locks import fork_lock

if TYPE_CHECKING:
    from pipeline.config import StorageConfig

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 15.0
_reached: set[str | None] = set()
_guard = fork_lock()  # of `_retries`
_retries = 0  # of this process
# Set when the interpreter begins to exit, which joins the worker threads of s3transfer. Without it, an upload to a store that does not
# answer would keep a finished process alive until its retries end.
_exiting = threading.Event()
threading._register_atexit(_exiting.set)  # type: ignore[attr-defined]  # atexit itself runs after the join
_of_thread = threading.local()


def mark_reached(config: StorageConfig) -> None:
    """Records that the endpoint of `config` has answered, here or in the process that started this one.

    From then on a refused connection or an unknown host is an outage (`StorageUnavailable` after `patience_s`), not a wrong address
    (`AccessError` within seconds).
    """
    _reached.add(config.endpoint_url)


def retries() -> int:
    """Requests that this process has repeated so far."""
    return _retries


def is_reached(config: StorageConfig) -> bool:
    """Whether the endpoint of `config` has answered."""
    return config.endpoint_url in _reached


def end_pauses_at(stopped: threading.Event | None) -> None:
    """Ends all pauses of the calling thread, with CancelledError, when `stopped` is set. Per thread, because several loaders may read from
    one store.
    """
    _of_thread.stopped = stopped


def end_of_pauses() -> threading.Event | None:
    """What the calling thread gave to `end_pauses_at`, for other threads that read for it."""
    return getattr(_of_thread, "stopped", None)


class OutOfPatience(Exception):
    """All tries failed. Internal to this package: stores turn it into an error of `pipeline.errors`."""

    def __init__(self, what: str, detail: str, tries: int, seconds: float) -> None:
        super().__init__(what)
        self.what = what
        self.detail = detail
        self.tries = tries
        self.seconds = seconds

    def __str__(self) -> str:
        count = "1 try" if self.tries == 1 else f"{self.tries} tries"
        return f"{self.what} for {self.seconds:.{0 if self.seconds >= 10 else 1}f} s ({count}{', ' * bool(self.detail)}{self.detail})"


class Patience:
    """Pauses between tries: 0.1 s doubling to 15 s, with jitter, until `seconds` have passed without progress.

    `most`: most tries, whatever the time. `cancelled` ends a pause at once. One thread at a time uses it.
    """

    def __init__(self, seconds: float, most: int | None = None, cancelled: threading.Event | None = None) -> None:
        self._seconds = seconds
        self._most = most
        self._cancelled = cancelled
        self.progress()

    def progress(self) -> None:
        """Bytes arrived: time and tries are counted from here."""
        self._began = time.monotonic()
        self._tries = 0

    def again(
        self, what: str, detail: str = "", *, within_s: float | None = None, cause: BaseException | None = None
    ) -> None:
        """Pauses before the next try. `what` says what the store did ("did not answer"), `detail` the error's kind.

        `within_s` shortens the patience for this failure; `cause` becomes the cause of OutOfPatience.

        Raises:
            OutOfPatience: no time or tries are left, or the process is exiting.
            ValueError: cancelled.
            CancelledError: the event given to `end_pauses_at` is set.
        """
        self._tries += 1
        passed = time.monotonic() - self._began
        left = (self._seconds if within_s is None else min(within_s, self._seconds)) - passed
        if left <= 0 or (self._most is not None and self._tries >= self._most) or _exiting.is_set():
            raise OutOfPatience(what, detail, self._tries, passed) from cause
        # 2**8 * 0.1 s exceeds the longest pause. The last pause ends when the time does, so the last try is made then.
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._tries - 1, 8)) * random.uniform(0.5, 1.0)
        self._wait(min(pause, left))
        global _retries
        with _guard:
            _retries += 1

    def _wait(self, seconds: float) -> None:
        """Ends early if cancelled or if the process exits; of these two events one is polled."""
        ends = self._cancelled or end_of_pauses()
        if ends is None:
            _exiting.wait(seconds)
            return
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not _exiting.is_set():
            if ends.wait(min(left, 0.5)):
                raise ValueError("download was cancelled") if self._cancelled else CancelledError

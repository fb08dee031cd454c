"""Ordered read-ahead of one object: several ranged requests at a time, within a limit of bytes.

Reads are served from finished parts, so a slow consumer never keeps a connection idle until the server drops it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

MOST_THREADS = 8
LOOK_UP_S = 0.5  # interval at which a waiting reader checks whether the stream was closed


class FetchRange(Protocol):
    """Function that fetches one range of an object, with its own retries."""

    def __call__(
        self, start: int, length: int, cancelled: threading.Event, received: Callable[[int], None]
    ) -> bytes | bytearray:
        """Bytes `[start, start + length)`, all of them. Raises ValueError once `cancelled` is set.

        Calls `received` with the size of each block that arrives.
        """
        ...


class RangeStream:
    """`ReadStream` over parts of `part_bytes`, fetched in order by a few threads; at most `window_bytes` are held or requested."""

    def __init__(self, fetch: FetchRange, *, size: int, part_bytes: int, window_bytes: int) -> None:
        self.size = size
        self.wait_s = 0.0
        self._received_bytes = 0
        self._counting = threading.Lock()
        self._fetch = fetch
        self._part_bytes = part_bytes
        self._most_parts = max(1, window_bytes // part_bytes)
        self._position = 0
        self._asked = 0  # bytes requested so far
        self._part = memoryview(b"")  # rest of the part being read
        self._coming: deque[Future[bytes | bytearray]] = deque()
        self._cancelled = threading.Event()
        threads = max(1, min(self._most_parts, MOST_THREADS, -(-size // part_bytes)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._ask()

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer only at the end."""
        left = self.size - self._position
        wanted = left if n < 0 else min(n, left)
        if wanted <= len(self._part) and not self._cancelled.is_set():  # headers of a tar: no waiting, no joining
            return self._take(wanted)
        pieces = []
        while wanted:
            if not self._part:
                self._part = memoryview(self._next_part())
            pieces.append(self._take(min(wanted, len(self._part))))
            wanted -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def received_bytes(self) -> int:
        """Bytes received from the store, read-ahead included."""
        return self._received_bytes

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def close(self) -> None:
        """Stops read-ahead; running requests end at their next block of bytes."""
        self._cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._part = memoryview(b"")

    def __enter__(self) -> RangeStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _received(self, n: int) -> None:
        with self._counting:
            self._received_bytes += n

    def _take(self, n: int) -> bytes:
        data = bytes(self._part[:n])
        self._part = self._part[n:]
        self._position += n
        return data

    def _ask(self) -> None:
        """Requests parts until the window is full."""
        while len(self._coming) < self._most_parts and self._asked < self.size:
            length = min(self._part_bytes, self.size - self._asked)
            self._coming.append(self._pool.submit(self._fetch, self._asked, length, self._cancelled, self._received))
            self._asked += length

    def _next_part(self) -> bytes | bytearray:
        """Requests one more part and waits for the oldest one."""
        if self._cancelled.is_set():
            raise ValueError("read from a closed stream")
        self._part = memoryview(b"")
        self._ask()
        began = time.perf_counter()
        try:
            return self._wait(self._coming.popleft())
        except BaseException:
            self.close()  # the bytes behind a lost part must never be returned in its place
            raise
        finally:
            self.wait_s += time.perf_counter() - began

    def _wait(self, future: Future[bytes | bytearray]) -> bytes | bytearray:
        while True:
            try:
                return future.result(timeout=LOOK_UP_S)
            except TimeoutError:
                if self._cancelled.is_set():
                    raise ValueError("stream was closed while it was read") from None
            except CancelledError:
                raise ValueError("stream was closed while it was read") from None

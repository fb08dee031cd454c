"""Handlers of SIGINT, SIGTERM and SIGHUP for a whole command, start included. Imports only the standard library, so it loads fast.

Outside `deferred()` the first signal raises KeyboardInterrupt in the main thread: there is nothing to drain yet. Inside `deferred()` it
only sets a flag, which the block reads with `requested()`. The second signal always raises KeyboardInterrupt, the third ends the process
with exit code 130. Signals within `BURST_S` count as one: a closed terminal sends SIGHUP twice (shell and kernel), systemd sends SIGTERM
and SIGHUP. The handler neither prints nor takes a lock. Only commands install it (`handled()`), not programs that use Lathe as a library.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_CODE = 130
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BURST_S = 1.0


class _State:
    received = 0  # bursts of signals
    burst_at = 0.0  # time.monotonic() of the first signal of the last burst
    deferring = 0


def requested() -> bool:
    """Whether a signal has asked this command to stop."""
    return _State.received > 0


def insisted() -> bool:
    """Whether a second signal has asked this command to stop at once."""
    return _State.received > 1


def check() -> None:
    """Raises KeyboardInterrupt if a signal came inside a deferred block."""
    if requested():
        raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Installs the handlers for the block. Outside the main thread, where Python allows no handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.received = _State.deferring = 0
    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup
            before[number] = signal.signal(number, _on_signal)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _State.received = _State.deferring = 0


@contextmanager
def deferred() -> Iterator[None]:
    """Block in which the first signal only sets the flag."""
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1


def reinstall() -> None:
    """Installs Python's current handlers again: native code (`ray.init`, `ray.shutdown`) replaces them. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOPPING:
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)


def _on_signal(number: int, frame: object) -> None:
    now = time.monotonic()
    if _State.received and now - _State.burst_at < BURST_S:
        return
    _State.burst_at = now
    _State.received += 1
    if _State.received > 2:
        os._exit(EXIT_CODE)
    if _State.received == 1 and _State.deferring:
        return
    raise KeyboardInterrupt

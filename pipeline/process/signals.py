"""SIGINT, SIGTERM and SIGHUP of a command, for the whole of its run, start included. Light: imports nothing but the standard library.

Rule: outside `deferred()` the first signal raises KeyboardInterrupt in the main thread (nothing runs yet that must be drained). Inside
`deferred()` it only sets a flag, which the owner of the block reads with `requested()`. The second signal raises KeyboardInterrupt
anywhere; the third ends the process at once with exit code 130. Signals within `BURST_S` count as one: a closed terminal sends SIGHUP
twice (shell and kernel), systemd sends SIGTERM and SIGHUP. The handler itself neither prints nor takes a lock. Only commands install it
(`handled()`); a program that uses Lathe as a library keeps its own handlers.
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


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come that a deferred block let pass."""
    if requested():
        raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Installs the handlers, and puts back those that were there. Outside the main thread it does nothing: Python allows none there."""
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
    """Within the block the first signal only sets the flag."""
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1


def reinstall() -> None:
    """Installs the handlers that Python knows once more: native code (`ray.init`, `ray.shutdown`) replaces them without Python's
    knowledge. Outside the main thread it does nothing.
    """
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

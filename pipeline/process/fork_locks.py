"""Locks that are free in a forked process, whatever threads of its parent held: it lacks these threads, which would release them."""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()


def fork_lock() -> threading.Lock:
    """A lock for sections after any step of which its data are valid: a forked process may begin in the midst of one."""
    made = threading.Lock()
    _locks.add(made)
    return made


def _free() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # as concurrent.futures does


os.register_at_fork(after_in_child=_free)

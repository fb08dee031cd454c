"""Progress of a thread that loads a network: distinguishes a load that hangs (a dead mount, a lock) from one that is slow.

Counts CPU time of the thread, and bytes that its process has read and written, which covers downloads in other threads.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

TICKS_A_SECOND = 20
IO_BYTES = 1 << 20  # logs of the process's other threads stay below this


class LoadProgress:
    """Made in the thread; `value` may be read by any, as long as the thread lives."""

    def __init__(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())

    @property
    def value(self) -> int:
        """Grows while the load goes on. Without unit: only whether it has changed matters."""
        return int(time.clock_gettime(self._clock) * TICKS_A_SECOND) + _io_bytes() // IO_BYTES


def _io_bytes() -> int:
    """Bytes that the process has read and written through system calls; 0 where the system does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))

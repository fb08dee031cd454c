"""Thread that sends messages to one decoder process, so that a process that does not read stops nobody else.

Takes messages in order. Ends with the process, with `end`, or with an error that is reported.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class LaneSender:
    """Sends on a pipe that another thread reads and may close: it writes to a descriptor of its own.

    Raises:
        OSError: no further descriptor.
        RuntimeError: no further thread.
    """

    def __init__(self, pipe: Connection, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pipe = Connection(os.dup(pipe.fileno()))
        self._guard = threading.Lock()  # of closing it
        try:
            threading.Thread(target=self._run, name="lane-sender", daemon=True).start()
        except RuntimeError:
            self._pipe.close()
            raise

    def send(self, message: Any) -> None:
        """Returns at once."""
        self._messages.put(message)

    def end(self) -> None:
        """Ends the thread, also in the middle of a message to a process that survives its SIGKILL in a hung read."""
        with self._guard:
            if not self._pipe.closed:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)
        self._messages.put(None)

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # needs no answer here: the thread that reads sees the same end of file and reports the loss
        except Exception as error:  # noqa: BLE001 - raised by the owner
            self._failed(error)
        finally:
            with self._guard:
                self._pipe.close()

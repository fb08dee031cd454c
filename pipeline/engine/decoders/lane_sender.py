"""Thread that sends messages to one decoder process, in order. A process that does not read its pipe blocks only this thread.

It ends with the process, by `end`, or with an error that it reports.
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
    """Queue and thread that write to one decoder's pipe. Uses a duplicate descriptor, because the reading thread may close the pipe.

    Raises:
        OSError: the process has no further descriptor.
        RuntimeError: the machine starts no further thread.
    """

    def __init__(self, pipe: Connection, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pipe = Connection(os.dup(pipe.fileno()))
        self._guard = threading.Lock()  # of `_pipe.close`
        try:
            threading.Thread(target=self._run, name="lane-sender", daemon=True).start()
        except RuntimeError:
            self._pipe.close()
            raise

    def send(self, message: Any) -> None:
        """Queues a message and returns at once."""
        self._messages.put(message)

    def end(self) -> None:
        """Ends the thread, also in the middle of a message: a process in a hung read survives SIGKILL."""
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
            pass  # the thread that reads the pipe sees the end of file as well, and reports the loss
        except Exception as error:  # noqa: BLE001 - raised by the owner
            self._failed(error)
        finally:
            with self._guard:
                self._pipe.close()

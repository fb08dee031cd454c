"""moto as an S3 server on a loopback port whose conditional puts are atomic, as those of S3 are.

moto looks whether the object is there and writes it in two steps, and answers each connection in a thread of its own: of two conditional
puts at once both may succeed (measured: 5 of 8 with 10 ms between the steps). So puts are served one at a time.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer


class MotoServer:
    """`endpoint`; `close()` ends it. Takes any credentials."""

    def __init__(self, port: int) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
        self._put, one_at_a_time = S3Response.put_object, threading.Lock()

        def put_object(response: S3Response) -> Any:
            with one_at_a_time:
                return self._put(response)

        S3Response.put_object = put_object  # type: ignore[method-assign]
        self._server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._server.start()
        self.endpoint = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """Ends the server's thread."""
        self._server.stop()
        S3Response.put_object = self._put  # type: ignore[method-assign]

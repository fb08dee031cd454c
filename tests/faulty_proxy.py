"""A TCP relay that breaks things on purpose: real sockets, real half-finished answers.

Enters: the address of a real server and a plan. Leaves: an endpoint. Each accepted connection takes the next fault of the plan; when
the plan is used up, connections pass untouched.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """`cut`: close after `after_bytes` of the server's answer; `status`: answer `code` without asking the server; `stall`: say nothing."""

    kind: Literal["cut", "status", "stall"]
    after_bytes: int = 0
    code: int = 503
    body: bytes = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"


class FaultyProxy:
    """Relays to `host:port`; `plan` holds the faults to come, `seen` counts connections, `faults` those that were broken."""

    def __init__(
        self, target: tuple[str, int], plan: list[Fault] | None = None, *, forever: Fault | None = None
    ) -> None:
        self.plan = list(plan or [])
        self.forever = forever
        self.seen = 0
        self.faults = 0
        self._target = target
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            with self._guard:
                self.seen += 1
                fault = self.plan.pop(0) if self.plan else self.forever
                self.faults += fault is not None
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault | None) -> None:
        with client:
            if fault is not None and fault.kind == "stall":
                self._stopping.wait(60)
                return
            if fault is not None and fault.kind == "status":
                _read_request(client)
                head = f"HTTP/1.1 {fault.code} Fault\r\nContent-Length: {len(fault.body)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + fault.body)
                return
            limit = fault.after_bytes if fault is not None else None
            with socket.create_connection(self._target) as server:
                up = threading.Thread(target=_pump, args=(client, server, None), daemon=True)
                up.start()
                _pump(server, client, limit)
                for side in (client, server):
                    _shut(side)
                up.join(5)


def _read_request(client: socket.socket) -> None:
    """Headers and body, so that closing does not reset what the client has not read yet."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = client.recv(65536)
        if not block:
            return
        data += block
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    if b"100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while len(rest) < length:
        block = client.recv(65536)
        if not block:
            return
        rest += block


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    sent = 0
    while limit is None or sent < limit:
        try:
            block = source.recv(65536 if limit is None else min(65536, limit - sent))
            if not block:
                _shut(sink, socket.SHUT_WR)
                return
            sink.sendall(block)
        except OSError:  # the other side is gone
            return
        sent += len(block)


def _shut(side: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    try:
        side.shutdown(how)
    except OSError:  # already closed
        return

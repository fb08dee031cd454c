"""A relay in front of a real server that breaks things on purpose: real sockets, real half-finished answers.

Enters: the address of a server and a rule that says which request suffers what. Leaves: an endpoint. One request a connection, so that
a rule hits exactly the request it means.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"


@dataclass(frozen=True)
class Fault:
    """`cut`: close after `after_bytes` of the answer's body; `status`: answer `code` without asking the server; `stall`: send
    `after_bytes` of the body, then nothing more."""

    kind: Literal["cut", "status", "stall"]
    after_bytes: int = 0
    code: int = 503
    body: bytes = SLOW_DOWN


Rule = Callable[[str, str, int], "Fault | None"]  # method, target, how many requests of this method came before


def first(n: int, fault: Fault, method: str = "GET") -> Rule:
    """The first `n` requests of a method suffer."""
    return lambda got, _, before: fault if got == method and before < n else None


def always(fault: Fault, method: str = "GET") -> Rule:
    """Every request of a method suffers."""
    return lambda got, _, before: fault if got == method else None


class FaultyProxy:
    """Relays to `host:port`. `requests` lists (method, target) as they came, `faults` counts those that were broken,
    `body_bytes` what was passed on of the bodies of answers to GET."""

    def __init__(self, target: tuple[str, int], rule: Rule) -> None:
        self.rule = rule
        self.requests: list[tuple[str, str]] = []
        self.faults = 0
        self.body_bytes = 0  # of answers to GET, as passed on
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
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            threading.Thread(target=self._guarded, args=(client,), daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        try:
            with client:
                self._serve(client)
        except OSError:  # one side is gone: that is what this is for
            return

    def _serve(self, client: socket.socket) -> None:
        head, rest = _until(client, b"\r\n\r\n")
        if not head:
            return
        method, target = head.split(b" ", 2)[0].decode(), head.split(b" ", 2)[1].decode()
        with self._guard:
            before = sum(1 for seen, _ in self.requests if seen == method)
            self.requests.append((method, target))
            fault = self.rule(method, target, before)
            self.faults += fault is not None
        if re.search(rb"\r\nexpect: *100-continue", head, re.I):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"\r\nexpect: *100-continue", b"", head, flags=re.I)
        if fault is not None and fault.kind == "status":
            _read_body(client, head, rest)
            client.sendall(
                b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (fault.code, len(fault.body))
            )
            client.sendall(fault.body)
            return
        head = re.sub(rb"\r\nconnection: [^\r]*", b"", head, flags=re.I)
        with socket.create_connection(self._target) as server:
            server.sendall(head[:-4] + b"\r\nConnection: close\r\n\r\n")
            server.sendall(_read_body(client, head, rest))
            answer, body = _until(server, b"\r\n\r\n")
            client.sendall(answer)
            left = None if fault is None else fault.after_bytes
            while body or (body := server.recv(65536)):
                piece, body = (body, b"") if left is None else (body[:left], b"")
                client.sendall(piece)
                with self._guard:
                    self.body_bytes += len(piece) if method == "GET" else 0
                if left is not None:
                    left -= len(piece)
                    if left <= 0:
                        break
        if fault is not None and fault.kind == "stall":
            self._stopping.wait(60)


def _until(side: socket.socket, mark: bytes) -> tuple[bytes, bytes]:
    data = b""
    while mark not in data:
        block = side.recv(65536)
        if not block:
            return b"", b""
        data += block
    end = data.index(mark) + len(mark)
    return data[:end], data[end:]


def _read_body(client: socket.socket, head: bytes, body: bytes) -> bytes:
    match = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
    while len(body) < (int(match[1]) if match else 0):
        body += client.recv(1 << 20)
    return body

"""Relay in front of a real S3 server that breaks things on purpose: real sockets, real half-finished answers.

Takes the address of a server, gives an endpoint. Two ways to break: a rule that decides for each request, and named faults that are
turned on and off while the relay runs. One request a connection, so that a fault hits exactly the request it means.

    with FaultyProxy(s3.address) as proxy:
        with proxy.fault("away"): ...                              # connections are refused, open ones are cut
        proxy.turn_on("refuse", keys=r"b\\.tar$", code="InvalidObjectState")
        proxy.turn_on("slow", latency_s=0.3, bytes_per_s=20e6)     # all connections together, each direction
        proxy.turn_off("slow")

| name | what happens |
|---|---|
| `away` | the listener refuses connections |
| `throttle` | `status` (503) with `code` (SlowDown) |
| `refuse` | `status` (403) with `code` (AccessDenied) |
| `slow` | `latency_s` before each request, `bytes_per_s` in each direction |
| `cut` | the connection closes after `after_bytes` of the answer's body |
| `stall` | nothing more comes after `after_bytes` of the answer's body |
| `lie` | conditional writes lose their condition: every PUT succeeds |
| `lose_answer` | the server serves the request, then the connection closes before the answer |

`throttle`, `refuse`, `cut`, `stall` and `lose_answer` take `keys` (pattern searched in the decoded target), `methods` (pattern of the whole
method) and `times` (how many requests suffer).
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
BLOCK = 65536
Name = Literal["away", "throttle", "refuse", "slow", "cut", "stall", "lie", "lose_answer"]


@dataclass(frozen=True)
class Fault:
    """`cut`: close after `after_bytes` of the answer's body; `status`: answer `code` without asking the server; `stall`: send
    `after_bytes` of the body, then nothing more; `lose`: ask the server, send nothing."""

    kind: Literal["cut", "status", "stall", "lose"]
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


def never(*_: object) -> None:
    """No request suffers."""


@dataclass
class _Named:
    """A named fault that is turned on, and whom it hits. `left`: requests that may still suffer; None: all."""

    fault: Fault
    keys: str
    methods: str
    left: int | None


@dataclass(frozen=True)
class _Slow:
    latency_s: float = 0.0
    bytes_per_s: float | None = None


class FaultyProxy:
    """Relays to `host:port`. `requests` lists (method, target) as they came, `faults` counts those that were broken, `hits` those of each
    named fault, `body_bytes` what was passed on of the bodies of answers to GET."""

    def __init__(self, target: tuple[str, int], rule: Rule = never) -> None:
        self.rule = rule
        self.requests: list[tuple[str, str]] = []
        self.faults = 0
        self.hits: Counter[str] = Counter()
        self.body_bytes = 0  # of answers to GET, as passed on
        self._target = target
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._named: dict[str, _Named] = {}
        self._slow = _Slow()
        self._free_at = {"up": 0.0, "down": 0.0}  # when the line has sent what was given to it so far
        self._lying = False
        self._clients: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with suppress(OSError):  # already away
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def turn_on(self, name: Name, **options: Any) -> None:
        """Starts a named fault; the table above lists names and options. A second call replaces the first."""
        if name == "away":
            self._leave(**options)
        elif name == "slow":
            self._slow = _Slow(**options)
        elif name == "lie":
            self._lying = True
        else:
            aim = {key: options.pop(key, default) for key, default in (("keys", ""), ("methods", ".*"))}
            times = options.pop("times", None)
            with self._guard:
                self._named[name] = _Named(_fault(name, **options), left=times, **aim)

    def turn_off(self, name: Name) -> None:
        """Ends a named fault; one that is not on is fine."""
        if name == "away":
            self._return()
        elif name == "slow":
            self._slow = _Slow()
        elif name == "lie":
            self._lying = False
        else:
            with self._guard:
                self._named.pop(name, None)

    @contextmanager
    def fault(self, name: Name, **options: Any) -> Iterator[None]:
        """A named fault for the length of a block."""
        self.turn_on(name, **options)
        try:
            yield
        finally:
            self.turn_off(name)

    def _leave(self) -> None:
        address = self._listener.getsockname()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # Bound but not listening: connections are refused, and no other process gets the port meanwhile.
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)
        with self._guard:
            clients = list(self._clients)
        for client in clients:
            with suppress(OSError):  # it may be closed by now
                client.shutdown(socket.SHUT_RDWR)

    def _return(self) -> None:
        self._listener.listen(128)
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # the listener was closed
                return
            threading.Thread(target=self._guarded, args=(client,), daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        with self._guard:
            self._clients.add(client)
        try:
            with client:
                self._serve(client)
        except OSError:  # one side is gone: that is what this is for
            return
        finally:
            with self._guard:
                self._clients.discard(client)

    def _serve(self, client: socket.socket) -> None:
        head, rest = _until(client, b"\r\n\r\n")
        if not head:
            return
        method, target = head.split(b" ", 2)[0].decode(), head.split(b" ", 2)[1].decode()
        fault = self._choose(method, target)
        self._stopping.wait(self._slow.latency_s)
        if re.search(rb"\r\nexpect: *100-continue", head, re.I):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"\r\nexpect: *100-continue", b"", head, flags=re.I)
        body = self._read_body(client, head, rest)
        if fault is not None and fault.kind == "status":
            client.sendall(
                b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (fault.code, len(fault.body))
            )
            client.sendall(b"" if method == "HEAD" else fault.body)
            return
        if self._lying and re.search(rb"\r\nif-none-match:", head, re.I):
            head = _without_condition(head, body)
            self.hits["lie"] += 1
        head = re.sub(rb"\r\nconnection: [^\r]*", b"", head, flags=re.I)
        with socket.create_connection(self._target) as server:
            server.sendall(head[:-4] + b"\r\nConnection: close\r\n\r\n")
            server.sendall(body)
            self._answer(client, server, method, fault)
        if fault is not None and fault.kind == "stall":
            self._stopping.wait(60)

    def _answer(self, client: socket.socket, server: socket.socket, method: str, fault: Fault | None) -> None:
        head, body = _until(server, b"\r\n\r\n")
        if fault is not None and fault.kind == "lose":
            while server.recv(BLOCK):
                pass
            return
        client.sendall(head)
        left = None if fault is None else fault.after_bytes
        while body or (body := server.recv(BLOCK)):
            piece, body = (body, b"") if left is None else (body[:left], b"")
            self._pace("down", len(piece))
            client.sendall(piece)
            with self._guard:
                self.body_bytes += len(piece) if method == "GET" else 0
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    break

    def _choose(self, method: str, target: str) -> Fault | None:
        """The fault of one request: a named one, else the rule's."""
        with self._guard:
            before = sum(1 for seen, _ in self.requests if seen == method)
            self.requests.append((method, target))
            for name, named in self._named.items():
                if (
                    named.left == 0
                    or not re.fullmatch(named.methods, method)
                    or not re.search(named.keys, unquote(target))
                ):
                    continue
                if named.left is not None:
                    named.left -= 1
                self.hits[name] += 1
                self.faults += 1
                return named.fault
            fault = self.rule(method, target, before)
            self.faults += fault is not None
            return fault

    def _read_body(self, client: socket.socket, head: bytes, start: bytes) -> bytes:
        match = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
        length = int(match[1]) if match else 0
        body = bytearray(start)
        while len(body) < length:
            block = client.recv(BLOCK)
            if not block:
                raise ConnectionError("the client went away in the middle of its request")
            body += block
            self._pace("up", len(block))
        return bytes(body)

    def _pace(self, way: str, n: int) -> None:
        """Waits until a line of `bytes_per_s`, shared by all connections, has carried `n` more bytes."""
        rate = self._slow.bytes_per_s
        if rate is None:
            return
        with self._guard:
            now = time.monotonic()
            self._free_at[way] = max(now, self._free_at[way]) + n / rate
            wait = self._free_at[way] - now
        self._stopping.wait(wait)


def _fault(name: str, *, status: int | None = None, code: str | None = None, after_bytes: int = 0) -> Fault:
    if name in ("throttle", "refuse"):
        usual = (503, "SlowDown") if name == "throttle" else (403, "AccessDenied")
        said = b"<Error><Code>%s</Code></Error>" % (usual[1] if code is None else code).encode()
        return Fault("status", code=usual[0] if status is None else status, body=said if code != "" else b"")
    if name == "lose_answer":
        return Fault("lose")
    if name in ("cut", "stall"):
        return Fault("cut" if name == "cut" else "stall", after_bytes=after_bytes)
    raise ValueError(f"no fault is called {name!r}")


def _without_condition(head: bytes, body: bytes) -> bytes:
    """The request without `If-None-Match`, signed again: the signature covers that header.

    The secret key is taken from the environment, where the server fixture puts it.
    """
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    line, *fields = head[:-4].split(b"\r\n")
    method, target, _ = line.decode().split(" ", 2)
    headers = dict(field.decode().split(": ", 1) for field in fields)
    lower = {name.lower(): name for name in headers}
    signed = headers.pop(lower["authorization"])
    del headers[lower["if-none-match"]]
    key, _, region = re.search(r"Credential=([^,]*)/(\d+)/([^/]*)/s3", signed).groups()  # type: ignore[union-attr]
    request = AWSRequest(method=method, url=f"http://{headers[lower['host']]}{target}", headers=headers, data=body)
    S3SigV4Auth(Credentials(key, os.environ["AWS_SECRET_ACCESS_KEY"]), "s3", region).add_auth(request)
    lines = [line, *(f"{name}: {value}".encode() for name, value in request.headers.items())]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _until(side: socket.socket, mark: bytes) -> tuple[bytes, bytes]:
    data = b""
    while mark not in data:
        block = side.recv(BLOCK)
        if not block:
            return b"", b""
        data += block
    end = data.index(mark) + len(mark)
    return data[:end], data[end:]

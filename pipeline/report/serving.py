"""HTTP server for one output, on this machine only and read-only: its snapshots, running builds, and the pages on snapshots.

Binds to 127.0.0.1 and answers only requests whose `Host` is this machine: a web page elsewhere whose name resolves to 127.0.0.1 gets
nothing. Shows stored pages; of a snapshot without one it makes a page without pictures, once.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InputError, LatheError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.status import live_status
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.page import page_of, render
from pipeline.report.written import stored_page, takedown_keys

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.storage import Store

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost")
_PAGE = re.compile(r"/snapshots/([1-9]\d{0,17})\.html")
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
WITHOUT_PICTURES = ReportOptions(clips=0)


class OutputServer(ThreadingHTTPServer):
    """The server of one output. Use as a context manager; `serve_forever` answers requests until `shutdown`."""

    daemon_threads = True

    def __init__(self, port: int, store: Store, storage: StorageConfig) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.store, self._storage = store, storage
        self._made: dict[int, tuple[frozenset[str], bytes]] = {}  # with the takedowns of that time
        self._making = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback of a failed request, but says nothing of a browser that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def index(self) -> bytes:
        """The list of snapshots, newest first."""
        snapshots = Snapshots(self.store)
        found: list[dict[str, Any]] = []
        for number in reversed(snapshots.numbers()):
            try:
                record = snapshots.read(number)
                facts = {"created": record.created, "counts": record.counts, "checks": record.checks, "error": None}
            except LatheError as error:
                facts = {"created": None, "counts": None, "checks": (), "error": error.message}
            found.append({"number": number, **facts})
        return render("serve.html.j2", "serve.js", {"output": self.store.root, "snapshots": found}, connect="'self'")

    def page(self, number: int) -> bytes:
        """The stored page on a snapshot, else one without pictures, which is kept until a takedown is recorded or undone.

        Raises:
            InputError: no snapshot of this number, or something of it that cannot be read.
        """
        if (stored := stored_page(self.store, number)) is not None:
            return stored
        with self._making:
            taken = takedown_keys(self.store)
            if number not in self._made or self._made[number][0] != taken:
                self._made[number] = taken, page_of(*collect(self.store, number, self._storage, WITHOUT_PICTURES))
            return self._made[number][1]


class _Handler(BaseHTTPRequestHandler):
    server: OutputServer
    server_version, sys_version = "lathe", ""

    def do_GET(self) -> None:
        """Answers a request."""
        try:
            path = urllib.parse.urlsplit(self.path).path
            if (self.headers.get("Host") or "").rsplit(":", 1)[0].lower() not in HOSTS:
                self._send(
                    HTTPStatus.FORBIDDEN, TEXT, b"only this machine is served; open http://127.0.0.1 with the port\n"
                )
            elif path == "/":
                self._send(HTTPStatus.OK, HTML, self.server.index())
            elif path == "/progress.json":
                self._send(HTTPStatus.OK, JSON, json.dumps(live_status(self.server.store), default=str).encode())
            elif match := _PAGE.fullmatch(path):
                self._send(HTTPStatus.OK, HTML, self.server.page(int(match[1])))
            else:
                self._send(HTTPStatus.NOT_FOUND, TEXT, b"no such page; / lists the snapshots\n")
        except InputError as error:
            self._send(HTTPStatus.NOT_FOUND, TEXT, f"{error}\n".encode("utf-8", "backslashreplace"))
        except LatheError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, f"{error}\n".encode("utf-8", "backslashreplace"))

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: requests of a browser are not news."""

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def open_server(store: Store, storage: StorageConfig, port: int) -> OutputServer:
    """A server of the output, not answering yet. `port`: 0 for a free one.

    Raises:
        OutputError: not a latent set.
        ConfigError: the port is in use or may not be used.
    """
    Ledger(store).latent_set()
    try:
        return OutputServer(port, store, storage)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; name another, or 0 for a free one") from error

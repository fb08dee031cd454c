"""An S3 server that leaves out what Lathe must not depend on: conditions, ranges, honest status codes.

HTTP over real sockets, objects in memory.
"""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


class CarelessStore:
    """`endpoint` and its habits. `ranges`: `ignored` (200 and everything) or `as_200` (the range, but status 200).

    `put_answers` are given to conditional puts, one each, before they are served; `store_first` serves them all the same.
    """

    def __init__(self, *, ranges: str = "as_200", put_answers: tuple[int, ...] = (), store_first: bool = False) -> None:
        self.objects: dict[str, bytes] = {}
        self.ranges = ranges
        self.put_answers = list(put_answers)
        self.store_first = store_first
        self.puts = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> CarelessStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: CarelessStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.store.puts += 1
        if self.headers.get("If-None-Match") and self.store.put_answers:
            if self.store.store_first:
                self.store.objects[self.path] = data
            code = self.store.put_answers.pop(0)
            self._answer(code, f"<Error><Code>E{code}</Code></Error>".encode())
            return
        self.store.objects[self.path] = data
        self._answer(200, b"", data)

    def do_DELETE(self) -> None:
        self.store.objects.pop(self.path, None)
        self._answer(204, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            self._list()
            return
        data = self.store.objects.get(self.path)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        given = self.headers.get("Range")
        if given is None or self.store.ranges == "ignored":
            self._answer(200, data, data)
            return
        start, _, stop = given.removeprefix("bytes=").partition("-")
        last = min(int(stop or len(data)), len(data) - 1)
        part = data[int(start) : last + 1]
        self._answer(200, part, data, {"Content-Range": f"bytes {start}-{last}/{len(data)}"})

    def _list(self) -> None:
        bucket, _, query = self.path.partition("?")
        prefix = parse_qs(query).get("prefix", [""])[0]
        keys = sorted(path.removeprefix(f"{bucket}/") for path in self.store.objects)
        entries = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            f"<Size>{len(self.store.objects[f'{bucket}/{key}'])}</Size></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())

    def _answer(self, code: int, body: bytes, entity: bytes | None = None, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        if entity is not None:
            self.send_header("ETag", f'"{hashlib.md5(entity, usedforsecurity=False).hexdigest()}"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

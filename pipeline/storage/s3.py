"""S3 and everything that speaks its language.

Enters: `s3://bucket/prefix`, keys, bytes, the storage section. Leaves: what `pipeline.storage.Store` promises.
Requests are retried by botocore; what it does not retry, a body that breaks off, is resumed here at the byte reached,
pinned to the ETag, so that a replaced object is noticed and never mixed in.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from pipeline.errors import AccessError, NotFound, SourceChanged, StorageUnavailable
from pipeline.storage import ObjectInfo, Store, check_key
from pipeline.storage.connection import (
    BROKEN_BODY,
    CLIENT_FAILURES,
    changed,
    connect,
    explain_answer,
    explain_failure,
    explain_setup,
    http_status,
)
from pipeline.storage.stream import RangeStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.config import StorageConfig

MiB = 1024 * 1024
BLOCK_BYTES = MiB
PATIENCE_S = 5.0  # longest pause between tries of a broken body
PROBE = ".lathe-probe-"
# "auto" would pick the CRT client on some machines, which sends custom endpoints' transfers to AWS itself.
UPLOADS = TransferConfig(
    multipart_threshold=16 * MiB, multipart_chunksize=16 * MiB, max_concurrency=4, preferred_transfer_client="classic"
)


class S3Store(Store):
    """Objects under `s3://bucket/prefix/`."""

    def __init__(self, root: str, config: StorageConfig) -> None:
        self.root = root.rstrip("/")
        self._config = config
        self._bucket, _, prefix = self.root[len("s3://") :].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._conditional: bool | None = None

    def __repr__(self) -> str:
        return f"S3Store({self.root!r})"

    def uri(self, key: str) -> str:
        """`s3://bucket/prefix/key`."""
        return f"s3://{self._bucket}/{self._prefix}{check_key(key)}"

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[ObjectInfo]:
        """LIST pages of a thousand, in key order (UTF-8 bytes)."""
        folder = {} if recursive else {"Delimiter": "/"}
        pages: Iterator[dict[str, Any]] | None = None
        while True:
            with self._answers("") as client:
                if pages is None:
                    lister = client.get_paginator("list_objects_v2")
                    pages = iter(lister.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix, **folder))
                page = next(pages, None)
            if page is None:
                return
            for found in page.get("Contents", ()):
                if key := found["Key"][len(self._prefix) :]:
                    yield ObjectInfo(key, found["Size"], found["ETag"].strip('"'), found["LastModified"].timestamp())

    def stat(self, key: str) -> ObjectInfo:
        """One HEAD."""
        with self._answers(key) as client:
            head = client.head_object(**self._object(key))
        return ObjectInfo(key, head["ContentLength"], head["ETag"].strip('"'), head["LastModified"].timestamp())

    def read(self, key: str) -> bytes:
        """The whole object, resumed where it breaks."""
        return bytes(_Download(self, key).run())

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """One ranged GET, resumed where it breaks."""
        return bytes(_Download(self, key, start, start + length, etag).run()) if length > 0 else b""

    def open_stream(self, key: str, *, size: int, etag: str) -> RangeStream:
        """Ranged GETs of `part_bytes`, read ahead within `read_ahead_bytes`, each pinned to `etag`."""
        check_key(key)

        def fetch(start: int, length: int, cancelled: threading.Event) -> bytearray:
            data = _Download(self, key, start, start + length, etag, cancelled).run()
            if len(data) != length:
                raise SourceChanged(
                    f"{self.uri(key)} ends at byte {start + len(data)}, was listed with {size}", uri=self.uri(key)
                )
            return data

        return RangeStream(
            fetch, size=size, part_bytes=self._config.part_bytes, window_bytes=self._config.read_ahead_bytes
        )

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        with self._answers(key) as client:
            client.put_object(**self._object(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """PUT with `If-None-Match: *`. 412 may be the echo of our own repeated request, so the object is read back."""
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                with self._answers(key) as client:
                    client.put_object(**self._object(key), Body=data, IfNoneMatch="*")
            except SourceChanged:  # 412
                try:
                    return self.read(key) == data
                except NotFound:  # deleted between the two requests
                    _pause(attempt, None)
            except StorageUnavailable as error:
                if error.__cause__ is None or http_status(error.__cause__) != 409:
                    raise
                _pause(attempt, None)  # 409: another conditional write of this key is under way
            else:
                return True
        raise StorageUnavailable(
            f"{self.uri(key)}: still contested after {self._config.max_attempts} tries", uri=self.uri(key)
        )

    def upload(
        self, local_path: str | os.PathLike[str], key: str, *, progress: Callable[[int], None] | None = None
    ) -> ObjectInfo:
        """PUT, or multipart from 16 MiB on; s3transfer aborts what it cannot finish."""
        size = os.stat(local_path).st_size
        with open(local_path, "rb") as file, self._answers(key) as client:
            client.upload_fileobj(file, self._bucket, self._prefix + check_key(key), Config=UPLOADS, Callback=progress)
        stored = self.stat(key)
        if stored.size != size:
            raise StorageUnavailable(f"{self.uri(key)}: stored {stored.size} bytes of {size}", uri=self.uri(key))
        return stored

    def delete(self, key: str) -> None:
        """One DELETE; S3 answers the same for a missing key."""
        try:
            with self._answers(key) as client:
                client.delete_object(**self._object(key))
        except NotFound:  # some servers say so
            return

    def conditional_writes(self) -> bool:
        """Puts a scratch object twice; remembered, also in pickled copies."""
        if self._conditional is None:
            key = f"{PROBE}{uuid.uuid4().hex}"
            self.write(key, b"first")
            try:
                self._conditional = not self.put_if_absent(key, b"second")
            except AccessError as error:
                if error.__cause__ is None or http_status(error.__cause__) not in {400, 501}:
                    raise
                self._conditional = False  # the server does not know the header
            finally:
                self.delete(key)
        return self._conditional

    def check_writable(self) -> None:
        """Puts and deletes a scratch object."""
        key = f"{PROBE}{uuid.uuid4().hex}"
        self.write(key, b"lathe")
        self.delete(key)

    def preflight(self) -> None:
        """Lists one key with short timeouts and two tries."""
        try:
            with self._answers("", quick=True) as client:
                client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except StorageUnavailable as error:
            raise AccessError(f"{error.message}; nothing was started", uri=self.root) from error

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    @contextmanager
    def _answers(self, key: str, *, quick: bool = False) -> Iterator[Any]:
        """The client; what it raises inside becomes an error of the house."""
        where = f"s3://{self._bucket}/{self._prefix}{key}"
        try:
            connection = connect(self._config, quick=quick)
        except (*CLIENT_FAILURES, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise explain_setup(error, where) from error
        try:
            yield connection.client
        except ClientError as error:
            connection.answered = True
            raise explain_answer(error, where, self._bucket) from error
        except CLIENT_FAILURES as error:
            raise explain_failure(error, where, connection) from error
        connection.answered = True


class _Download:
    """Bytes `[start, stop)` of one object (`stop` None: to its end). A broken body goes on at the byte reached."""

    def __init__(
        self,
        store: S3Store,
        key: str,
        start: int = 0,
        stop: int | None = None,
        etag: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.store = store
        self.key = key
        self.start = start
        self.stop = stop
        self.etag = etag
        self.cancelled = cancelled
        self.data = bytearray()

    def run(self) -> bytearray:
        """All of it, shorter only where the object ends.

        Raises:
            StorageUnavailable: `max_attempts` bodies in a row broke off without a byte.
            ValueError: cancelled.
        """
        barren = 0
        while self.stop is None or len(self.data) < self.stop - self.start:
            reached = len(self.data)
            body = self._request()
            if body is None:
                break
            try:
                self._drain(body)
            except BROKEN_BODY as error:
                barren = 0 if len(self.data) > reached else barren + 1
                if barren >= self.store._config.max_attempts:
                    where = self.store.uri(self.key)
                    raise StorageUnavailable(
                        f"{where}: connection broke {barren} times at byte {self.start + reached}", uri=where
                    ) from error
                _pause(barren, self.cancelled)
            finally:
                body.close()
        return self.data

    def _request(self) -> Any:
        """The body from the byte reached on; None where nothing is left. The first answer fixes `stop` and `etag`."""
        reached = self.start + len(self.data)
        ask = self.store._object(self.key)
        if self.etag is not None:
            ask["IfMatch"] = f'"{self.etag}"'
        if reached or self.stop is not None:
            ask["Range"] = f"bytes={reached}-{'' if self.stop is None else self.stop - 1}"
        try:
            with self.store._answers(self.key) as client:
                answer = client.get_object(**ask)
        except AccessError as error:
            if error.__cause__ is not None and http_status(error.__cause__) == 416:
                return None
            raise
        total = self._check_range(answer, reached)
        self._check_etag(answer)
        self.stop = total if self.stop is None else min(self.stop, total)
        return answer["Body"]

    def _check_range(self, answer: dict[str, Any], reached: int) -> int:
        """Size of the object. The answer must start at the byte asked for; some servers call that 200, not 206."""
        given = answer.get("ContentRange")
        if given is None and reached == 0 and (self.stop is None or answer["ContentLength"] <= self.stop):
            return int(answer["ContentLength"])
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", given or "")
        if match is None or int(match[1]) != reached:
            answer["Body"].close()
            where = self.store.uri(self.key)
            raise AccessError(
                f"{where}: asked for bytes from {reached}, the store answered {given or 'the whole object'}; "
                "it must support ranges",
                uri=where,
            )
        return int(match[2])

    def _check_etag(self, answer: dict[str, Any]) -> None:
        """Some servers ignore If-Match; the ETag of the answer tells."""
        found = answer.get("ETag", "").strip('"')
        if self.etag is not None and found and found != self.etag:
            answer["Body"].close()
            raise changed(self.store.uri(self.key), f"ETag was {self.etag}, is {found}")
        self.etag = self.etag or found or None

    def _drain(self, body: Any) -> None:
        while block := body.read(BLOCK_BYTES):
            if self.cancelled is not None and self.cancelled.is_set():
                raise ValueError("download was cancelled")
            self.data += block


def _pause(tries: int, cancelled: threading.Event | None) -> None:
    """Exponential back-off with jitter, cut short by cancellation."""
    seconds = min(PATIENCE_S, 0.1 * 2**tries) * random.uniform(0.5, 1.0) if tries else 0.0
    if cancelled is None:
        time.sleep(seconds)
    elif cancelled.wait(seconds):
        raise ValueError("download was cancelled")

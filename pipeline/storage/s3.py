"""`Store` of S3 and servers with its API.

`connection.Connection` retries requests. A body that breaks off is resumed here at the byte reached, with the same ETag, so that bytes of a
replaced object are never mixed in.
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from pipeline.errors import AccessError, NotFound, SourceChanged, StorageUnavailable
from pipeline.storage import PROBE, Leftover, ObjectInfo, Store, Unlisted, check_key
from pipeline.storage.connection import connect, forget, patience_of
from pipeline.storage.patience import OutOfPatience, Patience
from pipeline.storage.refusals import (
    BROKEN_BODY,
    CLIENT_FAILURES,
    EXPIRED_CODES,
    changed,
    explain_answer,
    explain_failure,
    explain_given_up,
    explain_setup,
    http_status,
    kind,
    server_code,
)
from pipeline.storage.stream import RangeStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.config import StorageConfig

MiB = 1024 * 1024
# Small, since each block counts as progress, and a connection that stalls loses at most one: at 20 kB/s one arrives every 3 s. Costs 0.3 s
# CPU per GB more than blocks of 1 MiB (measured on loopback: 2.1 s against 1.8 s).
BLOCK_BYTES = 64 * 1024
# With two, one start in a hundred was refused, as if the address were wrong, where a store breaks a tenth of its answers.
PREFLIGHT_TRIES = 5
UNKNOWN_HEADER = {400, 501}  # answers of servers that do not know `If-None-Match`
# "auto" would pick the CRT client on some machines, which sends transfers for custom endpoints to AWS.
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
        return f"s3://{self._bucket}/{self._prefix}{self._checked(key)}"

    def _checked(self, key: str) -> str:
        """Any key of a whole bucket, which holds objects of other writers. Below a prefix, which is an output, only keys of `check_key`."""
        if self._prefix or not key:
            return check_key(key)
        return key

    def list(
        self, prefix: str = "", *, recursive: bool = True, unlisted: Callable[[Unlisted], None] | None = None
    ) -> Iterator[ObjectInfo]:
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
        try:
            with self._answers(key) as client:
                head = client.head_object(**self._object(key))
        except AccessError as error:
            if http_status(error.__cause__) == 403:
                self._raise_reason(key)
            raise
        return ObjectInfo(key, head["ContentLength"], head["ETag"].strip('"'), head["LastModified"].timestamp())

    def _raise_reason(self, key: str) -> None:
        """Raises the error with its reason: the answer to a refused HEAD has none, that to a GET of one byte has."""
        with self._answers(key) as client:
            client.get_object(**self._object(key), Range="bytes=0-0")["Body"].close()

    def read(self, key: str) -> bytes:
        """The whole object, resumed where it breaks."""
        return bytes(_Download(self, key).run())

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """One ranged GET, resumed where it breaks."""
        return bytes(_Download(self, key, start, start + length, etag).run()) if length > 0 else b""

    def open_stream(self, key: str, *, size: int, etag: str) -> RangeStream:
        """Ranged GETs of `part_bytes`, read ahead within `read_ahead_bytes`, each pinned to `etag`."""
        self._checked(key)

        def fetch(start: int, length: int, cancelled: threading.Event, received: Callable[[int], None]) -> bytearray:
            data = _Download(self, key, start, start + length, etag, cancelled, received).run()
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
        with self._answers(check_key(key)) as client:
            client.put_object(**self._object(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """PUT with `If-None-Match: *`. On a store found to be without conditional writes: a GET, then a plain PUT."""
        if self._conditional is not False:
            try:
                return self._create(check_key(key), data)
            except AccessError as error:
                if http_status(error.__cause__) not in UNKNOWN_HEADER or self.conditional_writes():
                    raise
        try:
            return self.read(check_key(key)) == data
        except NotFound:
            self.write(key, data)
            return True

    def _create(self, key: str, data: bytes) -> bool:
        """The conditional PUT. A 412 may be the answer to our own repeated request, so the object is read back."""
        patience = patience_of(self._config)
        while True:
            try:
                with self._answers(key, patience=patience) as client:
                    client.put_object(**self._object(key), Body=data, IfNoneMatch="*")
                return True
            except SourceChanged:  # 412
                try:
                    return self.read(key) == data
                except NotFound:  # deleted between the two requests
                    with self._answers(key):
                        patience.again("refused to create the object, which was not there")

    def upload(
        self, local_path: str | os.PathLike[str], key: str, *, progress: Callable[[int], None] | None = None
    ) -> ObjectInfo:
        """PUT, or multipart from 16 MiB on; s3transfer aborts uploads that it cannot finish."""
        size = os.stat(local_path).st_size

        def sent(n: int) -> None:
            if progress is not None and n > 0:  # s3transfer takes back what it reported when it sends a part again
                progress(n)

        try:
            with open(local_path, "rb") as file, self._answers(key) as client:
                client.upload_fileobj(file, self._bucket, self._prefix + check_key(key), Config=UPLOADS, Callback=sent)
        except StorageUnavailable as error:
            # If the answer to "complete" was lost, the upload no longer exists, but the object does.
            if server_code(error.__cause__) != "NoSuchUpload" or not self._holds(key, local_path, size):
                raise
        stored = self.stat(key)
        if stored.size != size:
            raise StorageUnavailable(f"{self.uri(key)}: stored {stored.size} bytes of {size}", uri=self.uri(key))
        return stored

    def _holds(self, key: str, local_path: str | os.PathLike[str], size: int) -> bool:
        """Whether the object has the bytes of the file. Bytes are compared: an older object may have the same size."""
        try:
            info = self.stat(key)
        except NotFound:
            return False
        if info.size != size:
            return False
        with open(local_path, "rb") as file, self.open_stream(key, size=size, etag=info.etag) as stream:
            while block := file.read(MiB):
                if stream.read(len(block)) != block:
                    return False
        return True

    def delete(self, key: str) -> None:
        """One DELETE; S3 answers the same for a missing key."""
        try:
            with self._answers(check_key(key)) as client:
                client.delete_object(**self._object(key))
        except NotFound:  # some servers say so
            return

    def leftovers(self, prefix: str, *, recursive: bool = True) -> Iterator[Leftover]:
        """Multipart uploads that were neither completed nor aborted."""
        folder = {} if recursive else {"Delimiter": "/"}
        with self._answers("") as client:
            pages = client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix, **folder
            )
            found = [item for page in pages for item in page.get("Uploads", ())]
        for item in found:
            key = item["Key"].removeprefix(self._prefix)
            within = item["Key"].startswith(self._prefix) and key.startswith(prefix)  # not every server looks at Prefix
            if within and (recursive or "/" not in key[len(prefix) :]):
                yield Leftover(key, item["UploadId"], 0, item["Initiated"].timestamp())

    def discard(self, leftover: Leftover) -> None:
        """Aborts the upload."""
        try:
            with self._answers(leftover.key) as client:
                client.abort_multipart_upload(**self._object(leftover.key), UploadId=leftover.upload)
        except (NotFound, StorageUnavailable) as error:
            if isinstance(error, StorageUnavailable) and server_code(error.__cause__) != "NoSuchUpload":
                raise

    def conditional_writes(self) -> bool:
        """Puts a scratch object twice; the result is cached, also in pickled copies."""
        if self._conditional is None:
            key = f"{PROBE}{uuid.uuid4().hex}"
            self.write(key, b"first")
            try:
                self._conditional = not self._create(key, b"second")
            except AccessError as error:
                if http_status(error.__cause__) not in UNKNOWN_HEADER:
                    raise
                self._conditional = False
            finally:
                self.delete(key)
        return self._conditional

    def check_writable(self) -> None:
        """Puts and deletes a scratch object."""
        key = f"{PROBE}{uuid.uuid4().hex}"
        self.write(key, b"lathe")
        self.delete(key)

    def preflight(self) -> None:
        """Lists one key with short timeouts and few tries."""
        try:
            self._list_one(tries=PREFLIGHT_TRIES)
        except StorageUnavailable as error:
            raise AccessError(f"{error.message}; nothing was started", uri=self.root) from error

    def probe(self) -> None:
        """Lists one key with short timeouts and one try."""
        self._list_one(tries=1, outage=True)

    def _list_one(self, *, tries: int, outage: bool = False) -> None:
        patience = Patience(self._config.patience_s, tries)
        with self._answers("", quick=True, patience=patience, outage=outage) as client:
            client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + self._checked(key)}

    @contextmanager
    def _answers(
        self, key: str, *, quick: bool = False, patience: Patience | None = None, outage: bool = False
    ) -> Iterator[Any]:
        """The client. Its errors in the block become errors of `pipeline.errors`. `key` is empty for requests about the bucket.

        `outage`: an unreachable endpoint is an outage, even if it never answered in this process.
        """
        where = f"s3://{self._bucket}/{self._prefix}{key}"
        try:
            connection = connect(self._config, quick=quick)
        except (*CLIENT_FAILURES, ValueError) as error:  # ValueError: an endpoint that is not a URL
            raise explain_setup(error, where) from error
        try:
            with connection.using(patience or patience_of(self._config)) as client:
                yield client
        except ClientError as error:
            if server_code(error) in EXPIRED_CODES:
                forget(connection)
            raise explain_answer(error, where, self._bucket, connection, key=key) from error
        except OutOfPatience as error:
            raise explain_given_up(error, where, connection, outage=outage) from error.__cause__
        except CLIENT_FAILURES as error:
            raise explain_failure(error, where, connection) from error


class _Download:
    """Download of bytes `[start, stop)` of one object (`stop` None: to its end). A broken body is resumed at the byte reached.

    `received` is called with the size of each block that arrives.
    """

    def __init__(
        self,
        store: S3Store,
        key: str,
        start: int = 0,
        stop: int | None = None,
        etag: str | None = None,
        cancelled: threading.Event | None = None,
        received: Callable[[int], None] | None = None,
    ) -> None:
        self.store = store
        self.key = key
        self.start = start
        self.stop = stop
        self.etag = etag
        self.cancelled = cancelled
        self.received = received
        self.data = bytearray()
        self.patience = patience_of(store._config, cancelled)

    def run(self) -> bytearray:
        """The bytes; fewer only if the object ends.

        Raises:
            StorageUnavailable: no byte arrived for `patience_s`, or in `max_attempts` tries.
            ValueError: cancelled.
        """
        with self.store._answers(self.key, patience=self.patience) as client:
            while self.stop is None or len(self.data) < self.stop - self.start:
                try:
                    body = self._request(client)
                    if body is None:
                        break
                    with closing(body):
                        self._drain(body)
                except BROKEN_BODY as error:
                    reached = self.start + len(self.data)
                    self.patience.again(f"broke the connection at byte {reached}", kind(error), cause=error)
        return self.data

    def _request(self, client: Any) -> Any:
        """The body from the byte reached on; None if no bytes are left. The first answer sets `stop` and `etag`."""
        reached = self.start + len(self.data)
        request = self.store._object(self.key)
        if self.etag is not None:
            request["IfMatch"] = f'"{self.etag}"'
        if reached or self.stop is not None:
            request["Range"] = f"bytes={reached}-{'' if self.stop is None else self.stop - 1}"
        try:
            answer = client.get_object(**request)
        except ClientError as error:
            if http_status(error) == 416:
                return None
            raise
        total = self._check_range(answer, reached)
        self._check_etag(answer)
        self.stop = total if self.stop is None else min(self.stop, total)
        return answer["Body"]

    def _check_range(self, answer: dict[str, Any], reached: int) -> int:
        """Size of the object. Checks that the answer starts at the byte requested; some servers send status 200 for that, not 206."""
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
        """Compares the ETag of the answer, since some servers ignore If-Match."""
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
            self.patience.progress()
            if self.received is not None:
                self.received(len(block))

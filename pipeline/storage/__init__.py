"""All access to files and object stores: one interface for a local folder and for `s3://bucket/prefix`.

Takes a root URI and the job's storage section, gives a `Store` (keys relative to the root, bytes, ordered read streams) and errors of
`pipeline.errors`, never those of a client library. Stores pickle; what they hold open is made again in the process that uses it.
boto3 is imported when the first `s3://` root is opened.

- `local`, `local_listing`, `local_errors`: a folder
- `s3`, `connection`, `patience`, `refusals`: S3 and servers with its API; clients; retries; what a failed request means
- `stream`, `ranged_file`: ordered read-ahead; an object as a seekable file
- `checkpoints`: model checkpoints in object storage
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from pipeline.errors import InputError, NotFound
from pipeline.storage.patience import mark_reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from pipeline.config import StorageConfig
    from pipeline.records import SourceObject

__all__ = [
    "ObjectInfo",
    "ReadStream",
    "Store",
    "Unlisted",
    "check_key",
    "check_place",
    "locate",
    "mark_reached",
    "open_source",
    "open_store",
    "read_uri",
    "stat_uri",
]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as the store sees it now.

    `etag` has no quotes; a local file's is `mtime_ns-size`. `modified` is seconds since 1970, UTC.
    """

    key: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Unlisted:
    """An entry of a local folder that is not an object: a link that leads to nothing, a fifo, a folder that may not be read."""

    key: str
    what: str  # link | fifo | socket | device | folder | file
    why: str  # "leads to nothing"


class ReadStream(Protocol):
    """Bytes of one object in order, from its start to the size it was listed with. `wait_s`: seconds spent waiting."""

    size: int
    wait_s: float

    @property
    def received_bytes(self) -> int:
        """Bytes that have arrived from the store, read-ahead included. It grows as long as the store delivers."""
        ...

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer only at the end.

        Raises:
            SourceChanged: the object is no longer the one that was listed.
            StorageUnavailable: no byte arrived for `patience_s`, or in `max_attempts` tries.
        """
        ...

    def tell(self) -> int:
        """Bytes read so far."""
        ...

    def close(self) -> None:
        """Stops read-ahead and lets go of connections. A `read` that waits in another thread ends with ValueError."""
        ...

    def __enter__(self) -> ReadStream: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(ABC):
    """Objects under a root. Keys are relative, `/`-separated, and data: one that would leave the root is a ValueError.

    Objects are created and deleted under the plain names that `check_key` takes. Those of other writers are read under whatever name they
    have: a local file by any path below the root, an object of a whole bucket by any key.

    Every method raises `StorageUnavailable` for what may pass (on S3 after `patience_s` of retries), `AccessError` for what a person
    must fix, `NotFound` for a missing object.
    """

    root: str

    @abstractmethod
    def uri(self, key: str) -> str:
        """Where `key` lives: an absolute path, or `s3://bucket/key`."""

    @abstractmethod
    def list(
        self, prefix: str = "", *, recursive: bool = True, unlisted: Callable[[Unlisted], None] | None = None
    ) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order, streamed.

        Without `recursive` only those without a further `/`. A root or prefix that does not exist is empty. Keys come as
        they are stored, odd ones too. With `unlisted`, entries of a local folder that are not files are told, and one that may not be read
        costs only itself; without it, that is an AccessError.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size, etag and time of one object."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Bytes `[start, start + length)`, cut at the end of the object.

        Raises:
            SourceChanged: `etag` was given and the object has another one.
        """

    @abstractmethod
    def open_stream(self, key: str, *, size: int, etag: str) -> ReadStream:
        """Ordered stream over the object as it was listed, read ahead within the bounds of the configuration."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces an object at once; nobody sees a part of it."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Creates the object; False if there is one with other bytes, True also where our own bytes are there already.

        On a store where `conditional_writes()` is False this promises nothing.
        """

    @abstractmethod
    def upload(
        self, local_path: str | os.PathLike[str], key: str, *, progress: Callable[[int], None] | None = None
    ) -> ObjectInfo:
        """Copies a local file in, large ones in parts; a failure leaves nothing. Returns what the store then holds.

        `progress` is called with the number of bytes sent since its last call, possibly from other threads. Bytes that are sent again count
        again.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes the object; a missing one is fine."""

    def exists(self, key: str) -> bool:
        """Whether `stat` finds it."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def described(self, key: str) -> Unlisted | None:
        """What is under a name that `stat` does not find and that is not a folder; None if nothing is."""
        return None

    @abstractmethod
    def conditional_writes(self) -> bool:
        """Whether a second create-only put is refused: tried once with a scratch key, then remembered.

        True says the store knows the condition, not that it settles races atomically (OpenStack Swift does not): read
        back what you wrote.
        """

    @abstractmethod
    def check_writable(self) -> None:
        """Writes and removes a scratch object.

        Raises:
            OutputError: a local folder that cannot be made or written.
            AccessError: the bucket refuses.
        """

    @abstractmethod
    def probe(self) -> None:
        """Asks once, with short timeouts and no retries, whether the store answers. For waiting out an outage.

        Raises:
            StorageUnavailable: nothing answers, or the store throttles or fails.
            AccessError: it refuses.
        """

    @abstractmethod
    def preflight(self) -> None:
        """Says within seconds whether the root can be reached and listed, instead of after all retries.

        Raises:
            AccessError: unreachable, unknown bucket, refused credentials; names what to check.
        """


def check_key(key: str) -> str:
    """`key` itself if it stays under a root.

    Raises:
        ValueError: empty, absolute, with a `..` or `.` part, a backslash or a NUL.
    """
    if not key or key.startswith("/") or "\\" in key or "\0" in key or {"..", "."} & set(key.split("/")):
        raise ValueError(f"key {key!r}: expected a relative path without '.', '..', backslash or NUL")
    return key


def check_place(key: str) -> str:
    """`key` itself if it is a path below a root, whatever characters it has (a backslash is one of them).

    Raises:
        ValueError: empty, absolute, with a `..` or `.` part or a NUL.
    """
    if not key or key.startswith("/") or "\0" in key or {"..", "."} & set(key.split("/")):
        raise ValueError(f"key {key!r}: expected a relative path without '.', '..' or NUL")
    return key


def open_store(root_uri: str, config: StorageConfig) -> Store:
    """The store behind a root: `s3://bucket[/prefix]`, `file:///path` or a path. Opens nothing yet.

    Raises:
        InputError: another scheme, or no bucket.
    """
    scheme = _scheme(root_uri)
    if scheme == "s3":
        from pipeline.storage.s3 import S3Store

        return S3Store(root_uri, config)
    from pipeline.storage.local import LocalStore

    return LocalStore(local_path(root_uri))


def locate(uri: str) -> tuple[str, str]:
    """Splits the URI of one object into a root and a key: bucket and key on S3, folder and file name locally."""
    if _scheme(uri) == "s3":
        bucket, _, key = uri[len("s3://") :].partition("/")
        return f"s3://{bucket}", key
    folder, name = os.path.split(os.path.abspath(local_path(uri)))
    return folder, name


def stat_uri(uri: str, config: StorageConfig) -> ObjectInfo:
    """`Store.stat` for a whole URI; the key in the answer is relative to `locate(uri)`'s root."""
    root, key = locate(uri)
    return open_store(root, config).stat(key)


def read_uri(uri: str, config: StorageConfig) -> bytes:
    """`Store.read` for a whole URI."""
    root, key = locate(uri)
    return open_store(root, config).read(key)


def open_source(source: SourceObject, config: StorageConfig) -> ReadStream:
    """Ordered stream over an object of the corpus, pinned to the size and etag it was listed with."""
    root, key = locate(source.uri)
    return open_store(root, config).open_stream(key, size=source.size, etag=source.etag)


def local_path(uri: str) -> str:
    """`file:///a%20b` or a path -> path; `~` is the home folder."""
    if uri.startswith("file://"):
        return unquote(urlsplit(uri).path)
    return os.path.expanduser(uri)


def _scheme(uri: str) -> str:
    scheme, sep, rest = uri.partition("://")
    if not sep or scheme == "file":
        return "file"
    if scheme != "s3":
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected a path, file:// or s3://bucket/prefix")
    if not rest.split("/")[0]:
        raise InputError(f"{uri}: no bucket; expected s3://bucket/prefix")
    return "s3"

"""All access to files and object stores: one interface for a local folder and for `s3://bucket/prefix`.

`open_store` takes a root URI and the job's storage section and returns a `Store`. Keys are relative to the root. Errors are those of
`pipeline.errors`, never of a client library. Stores can be pickled: connections are opened again in the process that uses them. boto3 is
imported with the first `s3://` root.

- `local`, `local_listing`, `local_errors`: a folder
- `s3`, `connection`, `patience`, `refusals`: S3 and servers with its API; clients; retries; what a failed request means
- `stream`, `ranged_file`: ordered read-ahead; an object as a seekable file
- `range_reader`, `batched_reads`: ranges into the caller's memory; several of local files in one system call
- `checkpoints`: model checkpoints in object storage
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.errors import InputError, NotFound
from pipeline.storage.patience import mark_reached, retries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from pipeline.config import StorageConfig
    from pipeline.records import SourceObject
    from pipeline.storage.range_reader import RangeReader

__all__ = [
    "PROBE",
    "Leftover",
    "ObjectInfo",
    "ReadStream",
    "Store",
    "Unlisted",
    "check_key",
    "check_place",
    "is_remote",
    "locate",
    "mark_reached",
    "open_source",
    "open_store",
    "read_uri",
    "retries",
    "stat_uri",
]


Result = TypeVar("Result")
PROBE = ".lathe-probe-"  # begins the names of objects that are written to try a store out, and deleted at once


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as the store lists it now. `etag` has no quotes, a local file's is `mtime_ns-size`; `modified` is in seconds since 1970."""

    key: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Unlisted:
    """An entry of a local folder that is not an object: a broken link, a fifo, a folder that may not be read."""

    key: str
    what: str  # link | fifo | socket | device | folder | file
    why: str  # "leads to nothing"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A write that was begun and not finished: a hidden file, or the parts of a multipart upload. Never listed as an object."""

    key: str  # of the hidden file, or of the object to be
    upload: str | None  # id of a multipart upload
    size: int  # bytes; 0 where the store does not say
    modified: float  # when it was begun or last written to, in seconds since 1970, by the store


class ReadStream(Protocol):
    """Bytes of one object in order, from its start to the size it was listed with. `wait_s`: seconds spent waiting."""

    size: int
    wait_s: float

    @property
    def received_bytes(self) -> int:
        """Bytes received from the store, read-ahead included."""
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
        """Stops read-ahead and releases connections. A `read` that waits in another thread ends with ValueError."""
        ...

    def __enter__(self) -> ReadStream: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(ABC):
    """Objects under a root. Keys are relative and `/`-separated; a key that would leave the root is a ValueError.

    Objects are created and deleted under keys that pass `check_key`. Objects of other writers can be read under other names: a local file
    by any path below the root, an object of a whole bucket by any key.

    Every method raises `StorageUnavailable` for temporary failures (on S3 after `patience_s` of retries), `AccessError` for failures that
    a person must fix, `NotFound` for a missing object.
    """

    root: str
    retried = 0  # reads that `patiently` made again

    def patiently(self, read: Callable[[], Result]) -> Result:
        """Result of `read`, which reads from this store: for readers that have no retries of their own. Raises as `read`.

        A local store makes it again while a mount fails, for `patience_s`; others make each request again themselves.
        """
        return read()

    @abstractmethod
    def uri(self, key: str) -> str:
        """URI of `key`: an absolute path, or `s3://bucket/key`."""

    @abstractmethod
    def list(
        self, prefix: str = "", *, recursive: bool = True, unlisted: Callable[[Unlisted], None] | None = None
    ) -> Iterator[ObjectInfo]:
        """Streams the objects whose key starts with `prefix`, in key order.

        Without `recursive` only those without a further `/`. A root or prefix that does not exist is empty. Keys are returned as stored,
        even if they fail `check_key`. `unlisted` is called for entries of a local folder that are not files or may not be read; without
        it, one that may not be read is an AccessError.
        """

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys of `list`. Cheaper where sizes cost a request each, as in a local folder."""
        return (info.key for info in self.list(prefix))

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

    def open_reader(self, key: str) -> RangeReader:
        """Reader of ranges of one object into the caller's memory. A local file is opened here, a remote object not yet asked for."""
        from pipeline.storage.range_reader import RangeReader

        return RangeReader(self, key)

    @abstractmethod
    def open_stream(self, key: str, *, size: int, etag: str) -> ReadStream:
        """Ordered stream over the object as it was listed, with read-ahead within the configured limits."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces an object atomically; readers never see a part of it."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Creates the object. Returns False if there is one with other bytes, True if it holds `data` now.

        Without `conditional_writes()` two writers at once may both get True, and the later object stays: read back what you wrote.
        """

    @abstractmethod
    def upload(
        self, local_path: str | os.PathLike[str], key: str, *, progress: Callable[[int], None] | None = None
    ) -> ObjectInfo:
        """Copies a local file into the store, large ones in parts; a failure leaves no object. Returns the stored object.

        `progress` is called with the bytes sent since its last call, possibly from other threads. Bytes that are sent again count again.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes the object, if it exists."""

    @abstractmethod
    def leftovers(self, prefix: str, *, recursive: bool = True) -> Iterator[Leftover]:
        """Unfinished writes of objects whose key starts with `prefix`, also those in progress."""

    @abstractmethod
    def discard(self, leftover: Leftover) -> None:
        """Removes an unfinished write, if it is still there. A writer that is at it fails."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def described(self, key: str) -> Unlisted | None:
        """The entry with a name that `stat` does not find and that is not a folder; None if there is none."""
        return None

    @abstractmethod
    def conditional_writes(self) -> bool:
        """Whether the store refuses a second create-only put. Tried once with a scratch key, then cached.

        True does not mean that the store settles races atomically (OpenStack Swift does not): read back what you wrote.
        """

    @abstractmethod
    def check_writable(self) -> None:
        """Writes and removes a scratch object.

        Raises:
            OutputError: a local folder that cannot be created or written.
            AccessError: the bucket denies it.
        """

    @abstractmethod
    def probe(self) -> None:
        """Sends one request with short timeouts and no retries, to find the end of an outage.

        Raises:
            StorageUnavailable: no answer, or the store throttles or fails.
            AccessError: the store denies access.
        """

    @abstractmethod
    def preflight(self) -> None:
        """Checks within seconds, without all retries, that the root can be reached and listed.

        Raises:
            AccessError: unreachable, unknown bucket, refused credentials; the message names what to check.
        """


def check_key(key: str) -> str:
    """Returns `key` if Lathe may create an object of that name.

    Raises:
        ValueError: empty, absolute, with a `..` or `.` part, a backslash or a NUL.
    """
    if not key or key.startswith("/") or "\\" in key or "\0" in key or {"..", "."} & set(key.split("/")):
        raise ValueError(f"key {key!r}: expected a relative path without '.', '..', backslash or NUL")
    return key


def check_place(key: str) -> str:
    """Returns `key` if it is a path below a root; unlike `check_key` it allows a backslash.

    Raises:
        ValueError: empty, absolute, with a `..` or `.` part or a NUL.
    """
    if not key or key.startswith("/") or "\0" in key or {"..", "."} & set(key.split("/")):
        raise ValueError(f"key {key!r}: expected a relative path without '.', '..' or NUL")
    return key


def open_store(root_uri: str, config: StorageConfig) -> Store:
    """The store of a root: `s3://bucket[/prefix]`, `file:///path` or a path. Sends no request.

    Raises:
        InputError: another scheme, or no bucket.
    """
    scheme = _scheme(root_uri)
    if scheme == "s3":
        from pipeline.storage.s3 import S3Store

        return S3Store(root_uri, config)
    from pipeline.storage.local import LocalStore

    return LocalStore(local_path(root_uri), config)


def locate(uri: str) -> tuple[str, str]:
    """Splits the URI of one object into a root and a key: bucket and key on S3, folder and file name locally."""
    if _scheme(uri) == "s3":
        bucket, _, key = uri[len("s3://") :].partition("/")
        return f"s3://{bucket}", key
    folder, name = os.path.split(os.path.abspath(local_path(uri)))
    return folder, name


def stat_uri(uri: str, config: StorageConfig) -> ObjectInfo:
    """`Store.stat` for a whole URI; the key of the result is relative to the root of `locate(uri)`."""
    root, key = locate(uri)
    return open_store(root, config).stat(key)


def read_uri(uri: str, config: StorageConfig) -> bytes:
    """`Store.read` for a whole URI."""
    root, key = locate(uri)
    return open_store(root, config).read(key)


def open_source(source: SourceObject, config: StorageConfig) -> ReadStream:
    """Ordered stream over an object of the corpus; an error if its size or etag is not the listed one."""
    root, key = locate(source.uri)
    return open_store(root, config).open_stream(key, size=source.size, etag=source.etag)


def local_path(uri: str) -> str:
    """`file:///a%20b` or a path -> path; `~` is the home folder."""
    if uri.startswith("file://"):
        return unquote(urlsplit(uri).path)
    return os.path.expanduser(uri)


def is_remote(uri: str) -> bool:
    """Whether the object is reached over a network: every scheme but `file://`."""
    return _scheme(uri) != "file"


def _scheme(uri: str) -> str:
    scheme, sep, rest = uri.partition("://")
    if not sep or scheme == "file":
        return "file"
    if scheme != "s3":
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected a path, file:// or s3://bucket/prefix")
    bucket = rest.split("/")[0]
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        shown = f"s3://…@{uri.rpartition('@')[2]}" if "@" in uri else uri  # without a secret key
        raise InputError(
            f"{shown}: no bucket has '@' or ':' in its name; keys of an account belong into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a profile, not into the URI"
        )
    if not bucket:
        raise InputError(f"{uri}: no bucket; expected s3://bucket/prefix")
    return "s3"

"""`Store` of a local folder.

New objects are written under a hidden name in their folder, flushed to disk, then renamed (or linked, if the name must be free). Hidden
files of killed writers are never listed.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipeline.config import StorageConfig
from pipeline.errors import NotFound, SourceChanged, StorageUnavailable
from pipeline.process.fork_locks import fork_lock
from pipeline.storage import Leftover, ObjectInfo, Result, Store, Unlisted, check_key, check_place
from pipeline.storage.local_errors import translated
from pipeline.storage.local_listing import SCRATCH, Listing, described, etag_of, info_of
from pipeline.storage.patience import OutOfPatience, Patience
from pipeline.storage.range_reader import LocalRangeReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

BUFFER_BYTES = 1024 * 1024
UPLOAD_BYTES = 8 * 1024 * 1024
# Errors of link(2) on file systems without hard links (FAT, some FUSE and network mounts).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
CREATE_TRIES = 100  # for a name that is taken when it is linked and free when it is read

_counting = fork_lock()  # of `retried`: stores are pickled, locks are not


class LocalStore(Store):
    """Files under `root`. A root that does not exist is an empty store until an object is written."""

    def __init__(self, root: str, config: StorageConfig | None = None) -> None:
        """`config`: how long reads are made again."""
        self.root = os.path.abspath(root)
        self._config = config or StorageConfig()

    def __repr__(self) -> str:
        return f"LocalStore({self.root!r})"

    def uri(self, key: str) -> str:
        """Absolute path of `key`."""
        return os.path.join(self.root, check_place(key))

    def list(
        self, prefix: str = "", *, recursive: bool = True, unlisted: Callable[[Unlisted], None] | None = None
    ) -> Iterator[ObjectInfo]:
        """Files in key order. Links are followed, except to a folder above; broken links are not listed."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_place(folder)
        yield from Listing(self.root, prefix, recursive, unlisted).walk(folder)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys of `list`, without a stat of each file."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_place(folder)
        yield from Listing(self.root, prefix, True, None).keys(folder)

    def stat(self, key: str) -> ObjectInfo:
        """Size, etag (`mtime_ns-size`) and time of one file."""
        path = self.uri(key)
        with translated(path):
            found = os.stat(path)
            if not os.path.isfile(path):
                raise NotFound(f"{path}: expected a file, found a folder or device")
            return info_of(key, found)

    def read(self, key: str) -> bytes:
        """The whole file."""
        path = self.uri(key)
        with (
            translated(path),
            open(path, "rb", buffering=0) as file,
        ):  # buffering takes half as long again for a small file
            return file.read()

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Bytes `[start, start + length)`, cut at the end."""
        path = self.uri(key)
        with translated(path), open(path, "rb") as file:
            if etag is not None:
                _check_unchanged(file.fileno(), path, etag)
            return os.pread(file.fileno(), length, start)

    def patiently(self, read: Callable[[], Result]) -> Result:
        """As `Store.patiently`."""
        patience: Patience | None = None
        while True:
            try:
                return read()
            except StorageUnavailable as error:
                patience = patience or Patience(self._config.patience_s, self._config.max_attempts)
                try:
                    patience.again(error.message)
                except OutOfPatience as given_up:
                    raise StorageUnavailable(str(given_up), uri=error.uri) from error
                with _counting:
                    self.retried += 1

    def open_reader(self, key: str) -> LocalRangeReader:
        """The open file."""
        return LocalRangeReader(self, key)

    def open_stream(self, key: str, *, size: int, etag: str) -> LocalStream:
        """The file, with read-ahead by the kernel."""
        return LocalStream(self.uri(key), size, etag)

    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces the file by a rename."""
        path = self.uri(check_key(key))
        with self._scratch(path) as scratch:
            _write_flushed(scratch, data)
            os.replace(scratch, path)
            _flush_folder(path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Links a finished file to its name, which fails if the name is taken: atomic, also between machines on NFS.

        Without hard links, a kill at the wrong moment leaves an empty file; see `_claim_and_replace`.
        """
        path = self.uri(check_key(key))
        with self._scratch(path) as scratch:
            _write_flushed(scratch, data)
            for _ in range(CREATE_TRIES):
                try:
                    _name_exclusively(scratch, path)
                except FileExistsError:
                    try:
                        return self.read(key) == data
                    except NotFound:  # deleted between the two
                        continue
                _flush_folder(path)
                return True
        raise StorageUnavailable(
            f"{path} could not be created: {CREATE_TRIES} times the name was taken and no file was there", uri=path
        )

    def upload(
        self, local_path: str | os.PathLike[str], key: str, *, progress: Callable[[int], None] | None = None
    ) -> ObjectInfo:
        """Copies to a hidden name, flushes, renames."""
        path = self.uri(check_key(key))
        with self._scratch(path) as scratch:
            with open(local_path, "rb") as source, open(scratch, "xb") as file:
                while block := source.read(UPLOAD_BYTES):
                    file.write(block)
                    if progress is not None:
                        progress(len(block))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
            _flush_folder(path)
        return self.stat(key)

    def delete(self, key: str) -> None:
        """Removes the file, if it exists. Folders stay."""
        path = self.uri(check_key(key))
        with translated(path), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)

    def leftovers(self, prefix: str, *, recursive: bool = True) -> Iterator[Leftover]:
        """Hidden files, in the folder that `prefix` names."""
        top = os.path.join(self.root, prefix.rpartition("/")[0])
        for folder, folders, names in os.walk(top):
            folders[:] = sorted(folders) if recursive else []
            for name in sorted(names):
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self.root).replace(os.sep, "/")
                if name.startswith(SCRATCH) and key.startswith(prefix):
                    with suppress(FileNotFoundError):  # its writer has just finished
                        found = os.stat(path)
                        yield Leftover(key, None, found.st_size, found.st_mtime)

    def discard(self, leftover: Leftover) -> None:
        """Removes the hidden file."""
        self.delete(leftover.key)

    def described(self, key: str) -> Unlisted | None:
        """A broken link, a fifo, a socket, a device, or a file whose status cannot be read."""
        found = described(self.uri(key))
        return None if found is None else Unlisted(key, *found)

    def conditional_writes(self) -> bool:
        """Always True: the file system has `link` and `O_EXCL`."""
        return True

    def check_writable(self) -> None:
        """Writes and removes a scratch file; creates the folder if there is none."""
        probe = os.path.join(self.root, "probe")
        with self._scratch(probe) as scratch:
            _write_flushed(scratch, b"lathe")

    def preflight(self) -> None:
        """Lists the folder if it is there."""
        with translated(self.root), suppress(FileNotFoundError):
            os.scandir(self.root).close()

    def probe(self) -> None:
        """Reads the status of the root, or of the nearest folder above it that exists."""
        folder = self.root
        with translated(self.root):
            while True:
                try:
                    os.stat(folder)
                    return
                except (FileNotFoundError, NotADirectoryError):
                    folder = os.path.dirname(folder)

    @contextmanager
    def _scratch(self, path: str) -> Iterator[str]:
        """A free hidden name in the folder of `path`; a file of that name is removed afterwards."""
        folder = os.path.dirname(path)
        scratch = os.path.join(folder, f"{SCRATCH}{uuid.uuid4().hex}")
        with translated(path, writing=True):
            os.makedirs(folder, exist_ok=True)
            try:
                yield scratch
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(scratch)


class LocalStream:
    """Ordered stream over a file. Raises SourceChanged if it is not the one that was listed, at the start or at the end."""

    def __init__(self, path: str, size: int, etag: str) -> None:
        self.size = size
        self.wait_s = 0.0
        self._path = path
        self._etag = etag
        self._position = 0
        with translated(path):
            self._file = open(path, "rb", buffering=BUFFER_BYTES)  # noqa: SIM115 - closed by `close`
        try:
            _check_unchanged(self._file.fileno(), path, etag)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            self._file.close()
            raise

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer only at the end."""
        left = self.size - self._position
        wanted = left if n < 0 else min(n, left)
        began = time.perf_counter()
        with translated(self._path):
            data = self._file.read(wanted)
        self.wait_s += time.perf_counter() - began
        self._position += len(data)
        if len(data) < wanted or self._position == self.size:
            _check_unchanged(self._file.fileno(), self._path, self._etag)
        return data

    @property
    def received_bytes(self) -> int:
        """Bytes read so far."""
        return self._position

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> LocalStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_unchanged(descriptor: int, path: str, etag: str) -> None:
    found = etag_of(os.fstat(descriptor))
    if found != etag:
        raise SourceChanged(
            f"{path} was replaced or written to: listed as {etag} (mtime_ns-size), now {found}", uri=path
        )


def _write_flushed(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _name_exclusively(scratch: str, path: str) -> None:
    """Gives `scratch` the name `path` atomically. Raises FileExistsError if the name is taken."""
    try:
        os.link(scratch, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _claim_and_replace(scratch, path)


def _claim_and_replace(scratch: str, path: str) -> None:
    """Gives `scratch` the name `path` if that is free, on file systems without hard links.

    Creating an empty file claims the name exclusively, then a rename replaces it by the contents. A kill between the two leaves an empty
    file, never a partial one. Readers ignore empty receipts.

    Raises:
        FileExistsError: the name is taken, or the claim was removed and another process has the name.
    """
    while True:
        claim = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if not os.path.samestat(os.fstat(claim), os.stat(path)):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            os.replace(scratch, path)
            return
        except FileNotFoundError:  # the claim was removed as an empty receipt
            if not os.path.exists(scratch):
                raise
        finally:
            os.close(claim)


def _flush_folder(path: str) -> None:
    """Flushes the folder, so that a rename or link survives a power cut."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and FUSE mounts cannot flush a folder
            raise
    finally:
        os.close(descriptor)

"""`Store` on a local folder.

New objects are written beside their place under a hidden name, flushed to disk, then renamed (or linked, where the name must be free).
Hidden leftovers of killed writers are never listed.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, LatheError, NotFound, OutputError, SourceChanged, StorageUnavailable
from pipeline.storage import ObjectInfo, Store, check_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

SCRATCH = ".lathe-tmp-"
BUFFER_BYTES = 1024 * 1024
UPLOAD_BYTES = 8 * 1024 * 1024
# What link(2) answers on file systems without hard links (FAT, some FUSE and network mounts).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# What a link that leads to nothing answers (also one that leads to itself), and a file that was deleted since it was seen.
DANGLING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
CREATE_TRIES = 100  # for a name that is taken when it is linked and free when it is read
# Failures of a mount that pass: a network file system that lost its server, a disk that is busy.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
}  # fmt: skip


class LocalStore(Store):
    """Objects are files under `root`. A root that does not exist is an empty store until something is written."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def __repr__(self) -> str:
        return f"LocalStore({self.root!r})"

    def uri(self, key: str) -> str:
        """Absolute path of `key`."""
        return os.path.join(self.root, check_key(key))

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[ObjectInfo]:
        """Files in key order. Links are followed, save to a folder above; those that lead to nothing or to themselves are passed over."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        yield from self._walk(folder, prefix, recursive, ())

    def _walk(
        self, folder: str, prefix: str, recursive: bool, above: tuple[tuple[int, int], ...]
    ) -> Iterator[ObjectInfo]:
        path = os.path.join(self.root, folder) if folder else self.root
        with _translated(path):
            try:
                here = os.stat(path)
                # A folder sorts as its keys do: "a-b" < "a/b" < "a0".
                named = sorted(
                    ((f"{entry.name}/" if _is_folder(entry) else entry.name, entry) for entry in os.scandir(path)),
                    key=_by_name,
                )
            except (FileNotFoundError, NotADirectoryError):
                return
        if (identity := (here.st_dev, here.st_ino)) in above:
            return
        for name, entry in named:
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                if recursive and (key.startswith(prefix) or prefix.startswith(key)):
                    yield from self._walk(key[:-1], prefix, recursive, (*above, identity))
            elif key.startswith(prefix) and not name.startswith(SCRATCH):
                info = _info_of_entry(key, entry)
                if info is not None:
                    yield info

    def stat(self, key: str) -> ObjectInfo:
        """Size, etag (`mtime_ns-size`) and time of one file."""
        path = self.uri(key)
        with _translated(path):
            found = os.stat(path)
            if not os.path.isfile(path):
                raise NotFound(f"{path}: expected a file, found a folder or device")
            return _info(key, found)

    def read(self, key: str) -> bytes:
        """The whole file."""
        path = self.uri(key)
        with _translated(path), open(path, "rb") as file:
            return file.read()

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Bytes `[start, start + length)`, cut at the end."""
        path = self.uri(key)
        with _translated(path), open(path, "rb") as file:
            if etag is not None:
                _check_unchanged(file.fileno(), path, etag)
            return os.pread(file.fileno(), length, start)

    def open_stream(self, key: str, *, size: int, etag: str) -> LocalStream:
        """The file itself, with the kernel told to read ahead."""
        return LocalStream(self.uri(key), size, etag)

    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces the file by a rename."""
        path = self.uri(key)
        with self._scratch(path) as scratch:
            _write_flushed(scratch, data)
            os.replace(scratch, path)
            _flush_folder(path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Links a finished file to its name, which fails if the name is taken: atomic, also between machines on NFS.

        Without hard links, a kill at the wrong moment leaves an empty object; see `_claim_and_replace`.
        """
        path = self.uri(key)
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
        """Copies beside the place, flushes, renames."""
        path = self.uri(key)
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
        """Removes the file; a missing one is fine. Folders stay."""
        path = self.uri(key)
        with _translated(path), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)

    def conditional_writes(self) -> bool:
        """Always: `link` and `O_EXCL` are the file system's own."""
        return True

    def check_writable(self) -> None:
        """Writes and removes a scratch file, making the folder if need be."""
        probe = os.path.join(self.root, "probe")
        with self._scratch(probe) as scratch:
            _write_flushed(scratch, b"lathe")

    def preflight(self) -> None:
        """Lists the folder if it is there."""
        with _translated(self.root), suppress(FileNotFoundError):
            os.scandir(self.root).close()

    def probe(self) -> None:
        """Asks the mount of the root, or of the nearest folder above that exists, for the folder's status."""
        folder = self.root
        with _translated(self.root):
            while True:
                try:
                    os.stat(folder)
                    return
                except (FileNotFoundError, NotADirectoryError):
                    folder = os.path.dirname(folder)

    @contextmanager
    def _scratch(self, path: str) -> Iterator[str]:
        """A free hidden name in the folder of `path`, gone afterwards."""
        folder = os.path.dirname(path)
        scratch = os.path.join(folder, f"{SCRATCH}{uuid.uuid4().hex}")
        with _translated(path, writing=True):
            os.makedirs(folder, exist_ok=True)
            try:
                yield scratch
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(scratch)


class LocalStream:
    """A plain file read in order. Ends with SourceChanged if the file is not, or no longer, the one that was listed."""

    def __init__(self, path: str, size: int, etag: str) -> None:
        self.size = size
        self.wait_s = 0.0
        self._path = path
        self._etag = etag
        self._position = 0
        with _translated(path):
            # The stream owns the file: it is closed in close().
            self._file = open(path, "rb", buffering=BUFFER_BYTES)  # noqa: SIM115
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
        with _translated(self._path):
            data = self._file.read(wanted)
        self.wait_s += time.perf_counter() - began
        self._position += len(data)
        if len(data) < wanted or self._position == self.size:
            _check_unchanged(self._file.fileno(), self._path, self._etag)
        return data

    @property
    def received_bytes(self) -> int:
        """Bytes that have arrived."""
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


def _by_name(item: tuple[str, os.DirEntry[str]]) -> str:
    return item[0]


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found), found.st_mtime)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with _translated(entry.path):
        try:
            return entry.is_dir()
        except OSError as error:
            if error.errno not in DANGLING:
                raise
            return False


def _info_of_entry(key: str, entry: os.DirEntry[str]) -> ObjectInfo | None:
    with _translated(entry.path):
        try:
            return _info(key, entry.stat()) if entry.is_file() else None
        except OSError as error:
            if error.errno not in DANGLING:
                raise
            return None


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_size}"


def _check_unchanged(descriptor: int, path: str, etag: str) -> None:
    found = _etag(os.fstat(descriptor))
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
    """Gives `scratch` the name `path`, whole at once. Raises FileExistsError if the name is taken."""
    try:
        os.link(scratch, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _claim_and_replace(scratch, path)


def _claim_and_replace(scratch: str, path: str) -> None:
    """Gives `scratch` the name `path` if that is free, where links are not supported.

    Creating an empty file is the exclusive step, a rename then puts the whole contents in its place. A kill between the two leaves a file
    of zero bytes, never a part: readers take an empty receipt for none.

    Raises:
        FileExistsError: the name is taken, or our claim was removed and another process holds it.
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
    """Makes a rename or link survive a power cut."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and FUSE mounts cannot flush a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _translated(path: str, *, writing: bool = False) -> Iterator[None]:
    """Turns errors of the operating system into those of `pipeline.errors`."""
    try:
        yield
    except FileNotFoundError as error:
        missing = os.fsdecode(error.filename or path)
        raise NotFound(f"{missing} does not exist", uri=path) from None
    except OSError as error:
        raise _explained(error, path, writing) from error


def _explained(error: OSError, path: str, writing: bool) -> LatheError:
    reason = error.strerror or str(error)
    if error.errno in PASSING:
        return StorageUnavailable(f"{path}: {reason}", uri=path)
    if writing:
        return OutputError(
            f"{path} cannot be written: {reason}; check the folder's owner, its mount and the free space", uri=path
        )
    if error.errno in {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}:
        return NotFound(f"{path} is not a file: {reason}", uri=path)
    return AccessError(
        f"{path} cannot be read: {reason}; check the permissions of the file and the folders above", uri=path
    )

"""Encoded videos as file objects for libav that remember an I/O error. Part of the decode package.

libav turns an OSError of its file into "invalid data" or an early end of the stream, and PyAV prints some. So a failed read returns an
end of file here, and the caller calls `check` after every libav call. A failing disk or mount is then never taken for a damaged video.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from pipeline.errors import SourceChanged, SourceRefused, StorageUnavailable
from pipeline.video.decode.read_mark import READING

if TYPE_CHECKING:
    from pipeline.errors import LatheError

GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
DENIED = {errno.EACCES, errno.EPERM}
BAD_OFFSET = {errno.EINVAL, errno.EOVERFLOW}  # of seek: hostile bytes made libav seek to an impossible offset


class MemoryFile(io.BytesIO):
    """Encoded bytes in memory, whose reads cannot fail."""

    def check(self) -> None:
        """Does nothing."""


class DiskFile:
    """A local file without a buffer: libav has one, and hashing reads large blocks."""

    def __init__(self, path: str) -> None:
        """Opens `path`. Raises the errors of `storage_error`."""
        self.name = path
        self.failure: OSError | None = None
        try:
            with READING:
                self._raw = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise storage_error(error, path) from None

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`; empty at the end and after a failure, which `check` reports."""
        try:
            with READING:
                data = self._raw.read(size)
        except OSError as error:
            self.failure = self.failure or error
            return b""
        if data is None:  # what FileIO makes of EAGAIN
            self.failure = self.failure or BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return b""
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; returns the new position, or -1 after a failure, which `check` reports. Raises OSError for an impossible offset."""
        try:
            with READING:
                return self._raw.seek(offset, whence)
        except OSError as error:
            if error.errno in BAD_OFFSET:
                raise
            self.failure = self.failure or error
            return -1

    def tell(self) -> int:
        """The position."""
        return self._raw.tell()

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        with READING:
            self._raw.close()

    def check(self) -> None:
        """Raises the error of the first read or seek that failed, if one did.

        Raises:
            StorageUnavailable, SourceChanged, SourceRefused: see `storage_error`.
        """
        if self.failure is not None:
            raise storage_error(self.failure, self.name)


EncodedFile = MemoryFile | DiskFile


def open_encoded(video: bytes | str) -> EncodedFile:
    """A file object over encoded bytes or a local path.

    Raises:
        StorageUnavailable, SourceChanged, SourceRefused: the path cannot be opened; see `storage_error`.
    """
    return MemoryFile(video) if isinstance(video, bytes) else DiskFile(video)


def storage_error(error: OSError, path: str) -> LatheError:
    """The error of the storage for an OSError of a video's file. It is never damage: another read of the same bytes may succeed."""
    reason = error.strerror or str(error)
    if error.errno in GONE:
        message = (
            f"{path} was removed or replaced before it was decoded ({reason}); run again to encode the files there now"
        )
        return SourceChanged(message, uri=path, stage="decode")
    if error.errno in DENIED:
        message = f"{path} cannot be read by a decoder: {reason}; check its permissions and those of the folders above"
        return SourceRefused(message, uri=path, stage="decode")
    return StorageUnavailable(f"{path} cannot be read by a decoder: {reason}", uri=path, stage="decode")

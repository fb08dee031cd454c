"""Translation of operating-system errors of local files into errors of `pipeline.errors`."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, LatheError, NotFound, OutputError, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Temporary failures of a mount: a network file system that lost its server, a disk that is busy.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
}  # fmt: skip

TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}


@contextmanager
def translated(path: str, *, writing: bool = False) -> Iterator[None]:
    """Turns errors of the operating system into those of `pipeline.errors`.

    Raises:
        NotFound: there is no such file, or the name is not that of a file.
        StorageUnavailable: the failure may be temporary.
        OutputError: another error while writing.
        AccessError: another error while reading.
    """
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
    if error.errno in TOO_MANY_OPEN:
        return AccessError(
            f"{path} cannot be opened: {reason}; raise the limit of open files (`ulimit -n`; of the machine: fs.file-max)",
            uri=path,
        )
    if error.errno == errno.ELOOP:
        return NotFound(f"{path} leads back to itself by symbolic links; name the file itself", uri=path)
    if error.errno in {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}:
        return NotFound(f"{path} is not a file: {reason}", uri=path)
    return AccessError(
        f"{path} cannot be read: {reason}; check the permissions of the file and the folders above", uri=path
    )

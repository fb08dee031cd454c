"""A video that a decoder on another machine than its encoder gets: fetched from the object store, or sent in pieces.

Takes a source range or pieces of bytes. Gives bytes up to `storage.spool_bytes`, else the path of a temporary file. Holds one video.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import NotFound, SourceChanged, StorageUnavailable
from pipeline.process.scratch import ScratchFolder
from pipeline.reader.spool import Spool
from pipeline.storage import locate, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig

PARTS_AT_ONCE = 4  # ranged reads of `storage.part_bytes` under way


class Arrival:
    """See the module. `drop` before the next video."""

    def __init__(self) -> None:
        self.video: bytes | str = b""
        self._scratch: ScratchFolder | None = None
        self._spool: Spool | None = None
        self._file: BinaryIO | None = None

    def fetch(self, uri: str, etag: str, span: tuple[int, int], storage: StorageConfig) -> None:
        """Reads `span` (first byte, size) of the object as it was when it had `etag`.

        Raises:
            StorageUnavailable: the store, or this machine's temporary folder.
            SourceChanged: the object is gone or another one.
        """
        self.drop()
        self._spool = Spool(storage.spool_bytes)
        try:
            self.video = self._spool.hold(_parts(uri, etag, span, storage), span[1])
        except NotFound as error:
            raise SourceChanged(f"{error.message}, but was listed", uri=uri, stage="decode") from None
        except OSError as error:
            raise _no_space(error, uri) from None

    def append(self, piece: bytes, first: bool) -> None:
        """Adds to a temporary file; `first` begins a new video.

        Raises:
            StorageUnavailable: this machine's temporary folder cannot be written.
        """
        try:
            if first:
                self.drop()
                self._scratch = ScratchFolder()
                self.video = f"{self._scratch.path}/video"
                self._file = open(self.video, "xb", buffering=0)  # noqa: SIM115 - closed by `drop`
            if self._file is None:
                raise RuntimeError("a piece without its first one")
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _no_space(error, None) from None

    def drop(self) -> None:
        """Deletes the video, if there is one."""
        self.video = b""
        for held in (self._file, self._scratch, self._spool):
            if held is not None:
                held.close()
        self._file = self._scratch = self._spool = None


def _parts(uri: str, etag: str, span: tuple[int, int], storage: StorageConfig) -> Iterator[bytes]:
    root, key = locate(uri)
    store = open_store(root, storage)
    start, size = span
    step = storage.part_bytes

    def read(at: int) -> bytes:
        length = min(step, size - at)
        data = store.read_range(key, start + at, length, etag=etag)
        if len(data) < length:
            message = f"{uri}: bytes {start + at} to {start + at + length} asked for, {len(data)} of {length} came"
            raise StorageUnavailable(message, uri=uri, stage="decode")
        return data

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        for first in range(0, size, step * PARTS_AT_ONCE):  # not all at once: what waits is held in memory
            yield from pool.map(read, range(first, min(size, first + step * PARTS_AT_ONCE), step))


def _no_space(error: OSError, uri: str | None) -> StorageUnavailable:
    why = error.strerror or str(error)
    message = f"the temporary folder of a decoder's machine cannot be written: {why}; TMPDIR moves it"
    return StorageUnavailable(message, uri=uri, stage="decode")

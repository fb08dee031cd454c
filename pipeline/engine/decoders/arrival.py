"""The video of a decoder that runs on another machine than its encoder: fetched from the object store, or received in pieces.

Takes a range of a source object, or pieces of bytes. Gives bytes up to `storage.spool_bytes`, else the path of a temporary file.
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

PARTS_AT_ONCE = 4  # concurrent ranged reads of `storage.part_bytes`


class Arrival:
    """Holds one video: `fetch`, and `append` with `first`, replace it."""

    def __init__(self) -> None:
        self.video: bytes | str = b""
        self._scratch: ScratchFolder | None = None
        self._spool: Spool | None = None
        self._file: BinaryIO | None = None

    def fetch(self, uri: str, etag: str, span: tuple[int, int], storage: StorageConfig) -> None:
        """Reads `span` (first byte, size) of the object that has `etag`.

        Raises:
            StorageUnavailable: the store failed, or this machine's temporary folder cannot be written.
            SourceChanged: the object is gone or was replaced.
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
        """Appends to a temporary file; `first` begins a new video.

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
                raise RuntimeError("append() of a further piece before a first one")
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
            message = f"{uri}: asked for bytes {start + at} to {start + at + length}, got {len(data)} of {length}"
            raise StorageUnavailable(message, uri=uri, stage="decode")
        return data

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        for first in range(0, size, step * PARTS_AT_ONCE):  # a few at a time: parts that wait are held in memory
            yield from pool.map(read, range(first, min(size, first + step * PARTS_AT_ONCE), step))


def _no_space(error: OSError, uri: str | None) -> StorageUnavailable:
    why = error.strerror or str(error)
    message = f"the temporary folder of a decoder's machine cannot be written: {why}; free space there, or set TMPDIR"
    return StorageUnavailable(message, uri=uri, stage="decode")

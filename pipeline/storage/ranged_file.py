"""A stored object as a seekable file that is read by ranges: pyarrow and tarfile read footers and headers without fetching the rest."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from pipeline.storage.patience import end_of_pauses, end_pauses_at

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pipeline.storage import Store


class RangedFile(io.RawIOBase):
    """Read-only file; one request per read. `bytes_read` counts the bytes fetched. Pauses of reads end with those of the thread that made
    it: pyarrow reads several columns in threads of its own.
    """

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size = store, key, size
        self._at = 0
        self.bytes_read = 0
        self._stopped = end_of_pauses()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; nothing is requested until the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        """Fills as much of `buffer` as the object has left."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._at)
        if length <= 0:
            return 0
        of_thread = end_of_pauses()
        end_pauses_at(self._stopped)
        try:
            data = self._store.read_range(self._key, self._at, length)
        finally:
            end_pauses_at(of_thread)
        view[: len(data)] = data
        self._at += len(data)
        self.bytes_read += len(data)
        return len(data)

"""Stream that hashes the bytes read through it: the digest of an object that is read whole anyway."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from pipeline.storage import ReadStream

BLOCK_BYTES = 1024 * 1024


class HashedStream:
    """A `ReadStream` over another one. Hashing costs about a second a gigabyte, in the thread that reads."""

    def __init__(self, stream: ReadStream) -> None:
        self._stream = stream
        self._digest = hashlib.blake2b(digest_size=16)
        self.size = stream.size

    @property
    def wait_s(self) -> float:
        """Of the stream below."""
        return self._stream.wait_s

    @property
    def received_bytes(self) -> int:
        """Of the stream below."""
        return self._stream.received_bytes

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer only at the end."""
        data = self._stream.read(n)
        self._digest.update(data)
        return data

    def tell(self) -> int:
        """Bytes read so far."""
        return self._stream.tell()

    def finish(self) -> str:
        """Reads the rest (little, behind the end of an archive) and returns the BLAKE2b-128 of the object in hex."""
        while self.read(BLOCK_BYTES):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the stream below."""
        self._stream.close()

    def __enter__(self) -> HashedStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

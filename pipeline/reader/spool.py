"""Buffer of encoded videos for decoders: small ones in memory, large ones in temporary files, which do not outlive their process."""

from __future__ import annotations

import io
import os
import threading
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.process.scratch import ScratchFolder, local_disk

if TYPE_CHECKING:
    from collections.abc import Iterable


class Spool:
    """Files in one temporary folder, created with the first of them. Safe to use from several threads."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._guard = threading.Lock()
        self._scratch: ScratchFolder | None = None
        self._closed = False

    def hold(self, pieces: Iterable[bytes], size: int) -> bytes | str:
        """The bytes of `pieces` if `size` is at most `memory_bytes`, else the path of a file that holds them until `drop`.

        Raises:
            ValueError: the spool is closed.
            StorageUnavailable: the temporary folder or the file cannot be written.
        """
        if size <= self._memory_bytes:
            held = io.BytesIO()
            held.writelines(pieces)
            return held.getvalue()  # shares its buffer: a join would hold every byte twice
        path = os.path.join(self._open(), uuid.uuid4().hex)
        try:
            with local_disk(os.path.dirname(path)), open(path, "xb") as file:
                for piece in pieces:
                    file.write(piece)
        except BaseException:
            self.drop(path)
            raise
        return path

    def drop(self, path: str) -> None:
        """Deletes a file of this spool; other paths are not touched."""
        if self._scratch is not None and os.path.dirname(path) == self._scratch.path:
            with suppress(FileNotFoundError):  # dropped before
                os.unlink(path)

    def close(self) -> None:
        """Deletes the folder."""
        with self._guard:
            self._closed = True
            scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()

    def _open(self) -> str:
        with self._guard:
            if self._closed:
                raise ValueError("the spool is closed")
            if self._scratch is None:
                self._scratch = ScratchFolder()
            return self._scratch.path

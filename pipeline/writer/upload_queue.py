"""Queue and threads that upload the finished files of one shard attempt while the next files are built.

Takes finished local files with their side indexes; uploads both and deletes the local copies. Bounded by bytes on the local disk: `put`
waits while more than `most_bytes` are finished and not yet uploaded.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import LatheError
from pipeline.process.kill_points import fire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.config import DrillConfig
    from pipeline.records import WrittenFile
    from pipeline.storage import Store

UPLOAD_THREADS = 4
"""Concurrent uploads: a small file costs one round trip, and a single thread would wait for them one after the other."""

STOP_S = 5.0
"""Seconds that `abort` waits for running uploads."""


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """Data file and its index in the spool folder, checked and hashed, with their keys in the output."""

    path: Path
    index_path: Path
    written: WrittenFile

    @property
    def num_bytes(self) -> int:
        """Bytes of both files."""
        return self.written.num_bytes + self.written.index_bytes


class UploadQueue:
    """Queue of uploads: `put` files, then `finish`; or `abort`. Threads exist only while files are waiting or being uploaded.

    Args:
        store: the output.
        most_bytes: bytes of finished files on the local disk above which `put` waits. One file is always accepted.
        drill: where to fail on purpose, for tests: `before_upload`, `in_upload`, `after_upload`, `in_clean_up`.
        progress: called with the number of bytes sent, from any thread.
    """

    def __init__(
        self, store: Store, *, most_bytes: int, drill: DrillConfig, progress: Callable[[int], None] | None = None
    ) -> None:
        self._store = store
        self._most_bytes = most_bytes
        self._drill = drill
        self._progress = progress
        self._changed = threading.Condition()
        self._waiting: deque[FinishedFile] = deque()
        self._held_bytes = 0  # waiting or being uploaded
        self._running = 0  # threads
        self._error: BaseException | None = None
        self._stopped = False
        self._keys: list[str] = []  # may exist in the store
        self.sent_bytes = 0  # what is sent again counts again

    def put(self, file: FinishedFile) -> None:
        """Adds a file and takes ownership. Waits while too many bytes are finished and not uploaded.

        Raises:
            LatheError: an earlier upload failed, or the queue was aborted meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._fits(file))
            if self._stopped or self._error is not None:
                self._delete_local(file)
            self._check()
            self._waiting.append(file)
            self._held_bytes += file.num_bytes
            if self._running < UPLOAD_THREADS:
                self._running += 1
                threading.Thread(target=self._run, name="upload", daemon=True).start()

    def check(self) -> None:
        """Raises the error of a failed upload."""
        with self._changed:
            self._check()

    def finish(self) -> None:
        """Waits until every file is uploaded.

        Raises:
            LatheError: an upload failed, or the queue was aborted meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._running)
            self._check()

    def stop(self) -> None:
        """Prevents further uploads; `put` and `finish` raise from now on. Does not wait."""
        with self._changed:
            self._stopped = True
            while self._waiting:
                self._delete_local(self._waiting.popleft())
            self._changed.notify_all()

    def abort(self) -> None:
        """Stops, then deletes every object of this queue from the store, and waiting files from the local disk.

        An upload that takes longer than `STOP_S` deletes its own objects when it ends.

        Raises:
            LatheError: the store cannot delete; can be called again.
        """
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, STOP_S)
        while self._keys:
            self._store.delete(self._keys[-1])
            self._keys.pop()  # after the delete: a failed one can be tried again
            fire(self._drill, "in_clean_up")

    @property
    def _ended(self) -> bool:
        return self._stopped or self._error is not None

    def _fits(self, file: FinishedFile) -> bool:
        return not self._held_bytes or self._held_bytes + file.num_bytes <= self._most_bytes

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise LatheError("uploads were stopped", stage="write")

    def _run(self) -> None:
        while (file := self._next()) is not None:
            try:
                self._upload(file)
            except BaseException as error:  # noqa: BLE001 - raised by put, check or finish
                with self._changed:
                    self._error = self._error or error
            finally:
                self._delete_local(file)
                with self._changed:
                    self._held_bytes -= file.num_bytes
                    self._changed.notify_all()

    def _next(self) -> FinishedFile | None:
        with self._changed:
            if self._waiting and not self._ended:
                return self._waiting.popleft()
            self._running -= 1
            self._changed.notify_all()
            return None

    def _upload(self, file: FinishedFile) -> None:
        fire(self._drill, "before_upload")
        written = file.written
        for path, key in ((file.path, written.key), (file.index_path, written.index_key)):
            with self._changed:
                if self._stopped:
                    return
                self._keys.append(key)  # before the upload: one that fails half-way may leave an object
            try:
                self._store.upload(path, key, progress=self._count)
            finally:
                if self._stopped:  # `abort` may have deleted the key before the object existed
                    # The attempt has ended, so errors are ignored; an undeleted object is an orphan without receipt.
                    with suppress(LatheError):
                        self._store.delete(key)
        fire(self._drill, "after_upload")

    def _count(self, num_bytes: int) -> None:
        num_bytes = max(0, num_bytes)  # a client reports a negative number when it sends a part again
        with self._changed:
            self.sent_bytes += num_bytes
        if self._progress is not None:
            self._progress(num_bytes)
        fire(self._drill, "in_upload")

    def _delete_local(self, file: FinishedFile) -> None:
        for path in (file.path, file.index_path):
            # The scratch folder that holds the file is deleted with the attempt.
            with suppress(OSError):
                path.unlink()

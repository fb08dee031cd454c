"""Thread that reads the samples of one shard attempt, at most `SAMPLES_AHEAD` before a decoder asks for them.

Takes a shard and its `ShardScope`. Gives samples by `next_sample`, and rejects of the reader.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, LatheError, NotFound, SourceChanged, SourceRefused, StorageUnavailable
from pipeline.process import kill_points as drill
from pipeline.reader import ShardReader
from pipeline.reader.annotations import annotated
from pipeline.records import Reject, Sample
from pipeline.storage import locate, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipeline.config import EncodeJob
    from pipeline.engine.worker.progress_counter import ProgressCounter
    from pipeline.engine.worker.shard_scope import ShardScope
    from pipeline.records import SourceObject

SAMPLES_AHEAD = 4  # read and not yet handed to a decoder
STOP_S = 0.1  # how often a full queue is checked for `stop`


class ShardReading:
    """`thread.start()` begins. `next_sample` is called by the feed's thread, the other methods by any.

    Args:
        name: of the thread.
        dropped: samples that ended workers, by (URI, key) with the reason: rejected without decoding.
        begin: called in the thread first; returns False where nothing is to be read.
        failed: called in the thread with the error that ended it.
        wake: called when the thread ends, or when the last sample is taken.
    """

    def __init__(
        self,
        scope: ShardScope,
        job: EncodeJob,
        progress: ProgressCounter,
        name: str,
        *,
        dropped: Mapping[tuple[str, str], str] = MappingProxyType({}),
        begin: Callable[[], bool],
        failed: Callable[[BaseException], None],
        wake: Callable[[], None],
    ) -> None:
        self._scope = scope
        self._job = job
        self._progress = progress
        self._dropped = dropped
        self._begin = begin
        self._failed = failed
        self._wake = wake
        self._stop = threading.Event()
        self._samples: queue.Queue[Sample | None] = queue.Queue(SAMPLES_AHEAD)  # None: the end
        self._rejects: queue.SimpleQueue[Reject] = queue.SimpleQueue()
        self.all_read = False  # and the last sample was taken
        self.rejected_bytes = 0  # source bytes of plain files that the reader rejected
        limit = job.decode.max_video_bytes
        self.reader = ShardReader(
            scope.fetched(),
            job.storage,
            max_video_bytes=limit,
            unread=self._go_on_without,
            images=job.images.policy,
            members=job.member_rule,
        )
        self._received = lambda: self.reader.received_bytes
        progress.watch(self._received)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def next_sample(self) -> Sample | None:
        """A sample to decode; None if none has been fetched yet, all were taken, or the thread was stopped."""
        if self._stop.is_set():
            return None
        try:
            sample = None if self._scope.enough else self._samples.get_nowait()
        except queue.Empty:
            return None
        if sample is None or not self._scope.begin(sample.uri):
            self.all_read = True
            self._wake()
            return None
        return sample

    @property
    def waiting_for_fetch(self) -> bool:
        """Whether a decoder that asked now would get nothing because storage has not delivered yet."""
        return not self.all_read and self._samples.empty()

    def rejects(self) -> list[Reject]:
        """Rejects of the reader since the last call."""
        found = []
        while not self._rejects.empty():
            found.append(self._rejects.get())
        return found

    def stop(self) -> None:
        """No further sample is read or handed out. Does not wait."""
        self._stop.set()

    def close(self) -> None:
        """Releases what the reader holds; also ends a read that waits for the store."""
        self.reader.close()
        self._progress.unwatch(self._received)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._begin():
                self._read()
        except BaseException as error:  # noqa: BLE001 - raised in the encode loop by `ShardAttempt.poll`
            self._failed(error)
        finally:
            self._wake()

    def _read(self) -> None:
        try:
            for item in annotated(self.reader, self._scope.shard, self._job.clips):
                self._progress.add()
                if not self._scope.wants(item):
                    if isinstance(item, Sample):
                        self.reader.release(item)
                    continue
                if isinstance(item, Sample) and (why := self._dropped.get((item.uri, item.key))) is not None:
                    self.reader.release(item)
                    item = Reject(item.key, "encode", "ended_worker", why, policy=False, uri=item.uri)
                if isinstance(item, Sample):
                    if not self._offer(item):
                        return
                else:
                    self.rejected_bytes += self._scope.file_bytes(item.uri)
                    self._scope.begin(item.uri, partial(self._rejects.put, item))
            if (error := self._scope.first_error()) is not None:
                raise error
        except NotFound as error:  # it was there when it was listed: no reason to stop the other shards
            raise SourceChanged(f"{error.message}, but was listed", uri=error.uri) from error
        except AccessError as error:
            more = len(self._scope.refused) - 1
            others = f" (so are {more} more of its shard)" if more > 0 else ""
            raise SourceRefused(f"{error.message}{others}", uri=error.uri) from error
        drill.fire(self._job.drill, "after_fetch")
        self._offer(None)

    def _go_on_without(self, source: SourceObject, error: Exception) -> bool:
        """Whether the reader continues after a plain file that it could not read."""
        if not isinstance(error, StorageUnavailable):
            self._scope.cannot_read(source, error)
            return True
        try:
            open_store(locate(source.uri)[0], self._job.storage).probe()
        except LatheError:  # the store is away, and each further file would be retried for as long as this one
            return False
        return self._scope.set_aside(source.uri, error)

    def _offer(self, sample: Sample | None) -> bool:
        """Waits until `sample` fits into the queue. False: stopped, or the group ended."""
        while not self._stop.is_set() and not self._scope.enough:
            try:
                self._samples.put(sample, timeout=STOP_S)
            except queue.Full:
                continue
            return True
        return False

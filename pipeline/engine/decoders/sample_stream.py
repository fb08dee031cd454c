"""A corpus as a stream of what happens to its samples: opened, chunk, clip failed, ended, rejected. As `lathe encode` sees it.

For `lathe evaluate`, and with `headers_only` for `lathe plan`.

Enters: shards and the job's rules. Leaves: `SampleEvent`s; those of one sample in order, those of different samples interleaved. A
thread reads samples ahead, the engine's feed drives decoder processes that may be killed. Memory: a few samples, `engine.frame_bytes` of
frames.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

from pipeline.engine.decoders.feed import Feed, Restarted
from pipeline.engine.decoders.lanes import ProcessLanes, niceness_beside
from pipeline.errors import LatheError
from pipeline.reader import ShardReader
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, Sample, VideoEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from pipeline.config import EncodeJob
    from pipeline.records import ClipRules, Shard

READ_AHEAD = 4  # samples waiting for a decoder
WAIT_S = 0.2
MOST_DECODERS = 16  # as `lathe encode` for one encoder


class SampleEvent(NamedTuple):
    """Something that happened to sample `number` of the corpus, counted as they are read. The last of a sample is `VideoEnded`, a `Reject`,
    or the `LatheError` of a source that could not be read.
    """

    number: int
    sample: Sample | None  # None: the reader rejected it
    what: OpenedVideo | FrameChunk | ClipFailed | VideoEnded | Restarted | Reject | LatheError


class _OpenShard:
    """An open shard: closed once it is read and no sample of it is in use."""

    def __init__(self, reader: ShardReader, opened: set[_OpenShard]) -> None:
        """Stands among the `opened` until it is closed."""
        self.reader, self._opened = reader, opened
        self._users = 1  # whoever reads it
        self._guard = threading.Lock()
        opened.add(self)

    def take(self) -> None:
        with self._guard:
            self._users += 1

    def give_back(self, sample: Sample | None = None) -> None:
        if sample is not None:
            self.reader.release(sample)
        with self._guard:
            self._users -= 1
            last = self._users == 0
        if last:
            self.reader.close()
            self._opened.discard(self)


class _Ticket(NamedTuple):
    """What the feed knows a sample by."""

    number: int
    open_shard: _OpenShard
    alone: bool  # a plain file


class SampleStream:
    """Iterate once, inside `with`.

    Raises while iterating:
        StorageUnavailable, SourceChanged, SourceRefused: as the reader, or met by a decoder.
        WorkerLost: decoders that are killed from outside again and again.
        BuildError: decoder processes that die on start-up.
    """

    def __init__(
        self,
        job: EncodeJob,
        shards: Sequence[Shard],
        rules: ClipRules,
        chunk_frames: int,
        device: str,
        *,
        headers_only: bool = False,
        goes_on: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        """`chunk_frames`: most frames of a chunk behind the first. `device`: of the network beside the decoders. Processes start now,
        and warm up while a network loads. `headers_only`: videos are opened and nothing is cut. `goes_on`: whether to go on with the next
        file where a plain file cannot be read, by the reader or by a decoder.
        """
        self._job, self._shards = job, shards
        self._goes_on = goes_on
        self.counters: dict[str, int] = {}  # of the reader; complete at the end
        self._samples: queue.Queue[tuple[_Ticket, Sample]] = queue.Queue(READ_AHEAD)
        self._refused: queue.SimpleQueue[SampleEvent] = queue.SimpleQueue()
        self._read: int | None = None  # samples in all, once that is known
        self._error: BaseException | None = None
        self._open: set[_OpenShard] = set()
        self._stop = threading.Event()
        lanes = ProcessLanes(
            job.engine.decoders or max(1, min(MOST_DECODERS, os.cpu_count() or 1, _most_samples(shards))),
            job.decode.memory_bytes,
            niceness_beside(device),
        )
        self._feed = Feed(
            lanes,
            self,
            rules=rules,
            limits=job.decode,
            drill=job.drill,
            chunk_frames=chunk_frames,
            frame_bytes=job.engine.frame_bytes,
            largest_batch=lambda shape: 1,
            headers_only=headers_only,
        )
        self._thread = threading.Thread(target=self._read_all, name="samples", daemon=True)

    def __enter__(self) -> SampleStream:
        try:
            self._thread.start()
            self._feed.start()
        except BaseException:  # a signal: without this nobody would close what has begun
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._stop.set()
        self._feed.close()
        for open_shard in list(self._open):  # what was left early; also ends a read that waits for storage
            open_shard.reader.close()
        if self._thread.is_alive():
            self._thread.join()

    def __iter__(self) -> Iterator[SampleEvent]:
        ended = 0
        while self._read is None or ended < self._read:
            while not self._refused.empty():
                ended += 1
                yield self._refused.get()
            for event in self._feed.events(WAIT_S):
                failed = isinstance(
                    event.what, LatheError
                )  # not the video's fault: it would be missing from the result
                if isinstance(event.what, LatheError) and not (event.owner.alone and self._goes_on(event.what)):
                    raise event.what
                yield SampleEvent(event.owner.number, event.sample, event.what)
                if isinstance(event.what, FrameChunk):
                    self._feed.consumed(event.what.nbytes)
                elif failed or isinstance(event.what, VideoEnded | Reject):
                    ended += 1
                    event.owner.open_shard.give_back(event.sample)
            if self._error is not None:
                raise self._error

    def next_sample(self) -> tuple[_Ticket, Sample] | None:
        """For the feed."""
        try:
            return self._samples.get_nowait()
        except queue.Empty:
            return None

    # ---- the reading thread -----------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        count = 0
        try:
            for shard in self._shards:
                reader = ShardReader(
                    shard,
                    self._job.storage,
                    max_video_bytes=self._job.decode.max_video_bytes,
                    counters=self.counters,
                    unread=lambda source, error: self._goes_on(error),
                )
                open_shard = _OpenShard(reader, self._open)
                try:
                    for item in reader:
                        if self._stop.is_set():
                            return
                        self._hand_on(_Ticket(count, open_shard, alone=shard.kind == "files"), item)
                        count += 1
                finally:
                    open_shard.give_back()
            self._read = count
        except BaseException as error:  # noqa: BLE001 - handed to the owner's thread, which raises it
            self._error = error
        finally:
            self._feed.wake()

    def _hand_on(self, ticket: _Ticket, item: Sample | Reject) -> None:
        if isinstance(item, Reject):
            self._refused.put(SampleEvent(ticket.number, None, item))
            return
        ticket.open_shard.take()
        while not self._stop.is_set():
            try:
                self._samples.put((ticket, item), timeout=WAIT_S)
                return
            except queue.Full:
                continue


def _most_samples(shards: Sequence[Shard]) -> int:
    """How many samples there can be at most: more decoders would have nothing to do."""
    return sum(len(shard.objects) if shard.kind == "files" else 1 << 16 for shard in shards)

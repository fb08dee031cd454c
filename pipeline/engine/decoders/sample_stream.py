"""A corpus as a stream of `SampleEvent`s: opened, chunk, clip failed, ended, rejected. For `lathe evaluate`, and `lathe plan` (ADR 11).

Takes shards and the job's rules. Events of one sample come in order, those of different samples interleaved. A thread reads samples ahead
(ADR 15 says why it is not `ShardReading`), the feed drives decoder processes. Memory: a few samples, `engine.frame_bytes` of frames.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

from pipeline.engine.decoders.feed import Feed
from pipeline.engine.decoders.lanes import niceness_beside
from pipeline.engine.decoders.losses import Restarted
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.errors import LatheError
from pipeline.reader import ShardReader
from pipeline.reader.annotations import annotated
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, Sample, VideoEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from pipeline.config import EncodeJob
    from pipeline.records import ClipRules, Shard

READ_AHEAD = 4  # samples waiting for a decoder
WAIT_S = 0.2
MOST_DECODERS = 16  # as in `lathe encode` for one encoder


class SampleEvent(NamedTuple):
    """One step of sample `number` of the corpus, numbered in the order of reading. The last step is `VideoEnded`, a `Reject`, or the
    `LatheError` of a source that could not be read.
    """

    number: int
    sample: Sample | None  # None: the reader rejected it
    what: OpenedVideo | FrameChunk | ClipFailed | VideoEnded | Restarted | Reject | LatheError


class _OpenShard:
    """A shard with its reader, which is closed once the shard is read and no sample of it is in use."""

    def __init__(self, reader: ShardReader, opened: set[_OpenShard]) -> None:
        """Adds itself to `opened` until it is closed."""
        self.reader, self._opened = reader, opened
        self._users = 1  # the reading thread; each sample in use adds one
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
    """Owner of a sample in the feed."""

    number: int
    open_shard: _OpenShard
    alone: bool  # it is a plain file


class SampleStream:
    """Iterate once, inside `with`.

    Raises while iterating:
        StorageUnavailable, SourceChanged, SourceRefused: raised by the reader or by a decoder.
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
        with_rows: Callable[[Shard], Shard] = lambda shard: shard,
    ) -> None:
        """Starts the decoder processes, which warm up while a network loads.

        `chunk_frames`: most frames of a chunk after a clip's first chunk. `device`: of the network, for the decoders' niceness.
        `headers_only`: videos are opened, nothing is cut. `goes_on`: whether to skip a plain file that could not be read.
        `with_rows` adds rows of tables to a shard.
        """
        self._job, self._shards = job, shards
        self._goes_on, self._with_rows = goes_on, with_rows
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
            limits=job.decode.model_copy(update={"device": "cpu"}),  # the pixels are the same
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
        except BaseException:  # a signal: `__exit__` is not called for it
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
        for open_shard in list(
            self._open
        ):  # shards not read to their end; this also ends a read that waits for storage
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
                # Not the video's fault: without it the result would be incomplete.
                if isinstance(event.what, LatheError) and not (event.owner.alone and self._goes_on(event.what)):
                    raise event.what
                if isinstance(event.what, FrameChunk) and event.what.member:  # metrics and plans are of main videos
                    self._feed.consumed(event.what.nbytes)
                    continue
                yield SampleEvent(event.owner.number, event.sample, event.what)
                if isinstance(event.what, FrameChunk):
                    self._feed.consumed(event.what.nbytes)
                elif isinstance(event.what, VideoEnded | Reject | LatheError):
                    ended += 1
                    event.owner.open_shard.give_back(event.sample)
            if self._error is not None:
                raise self._error

    def next_sample(self) -> tuple[_Ticket, Sample] | None:
        """See `Source` of the feed."""
        try:
            return self._samples.get_nowait()
        except queue.Empty:
            return None

    # --- the reading thread -------------------------------------------------------------------------------------------

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
                    images=self._job.images.policy,
                    members=self._job.member_rule,
                )
                open_shard = _OpenShard(reader, self._open)
                try:
                    for item in annotated(reader, self._with_rows(shard), self._job.clips):
                        if self._stop.is_set():
                            return
                        self._hand_over(_Ticket(count, open_shard, alone=shard.kind == "files"), item)
                        count += 1
                finally:
                    open_shard.give_back()
            self._read = count
        except BaseException as error:  # noqa: BLE001 - handed to the owner's thread, which raises it
            self._error = error
        finally:
            self._feed.wake()

    def _hand_over(self, ticket: _Ticket, item: Sample | Reject) -> None:
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
    """Upper bound of the number of samples: more decoders would be idle."""
    return sum(len(shard.objects) if shard.kind == "files" else 1 << 16 for shard in shards)

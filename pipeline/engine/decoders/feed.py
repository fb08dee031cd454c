"""Thread that feeds one encoder's decoder processes. Takes samples from a `Source`, emits `Event`s, each with the owner of its sample.

Decoded bytes in flight never exceed `frame_bytes`. A decoder that dies or gives no answer within `decode.timeout_s` is replaced and its
video starts again (`Restarted`); decoding is deterministic, so the owner drops what it already has. How often depends on who ended it:

- its own work (a crash, a limit, an exit, the time limit): after `TRIES` of these the rest of the video is rejected;
- something outside (SIGKILL, a memory monitor, a node that is gone): never rejected; after `OUTSIDE_KILLS` of these the owner gets the
  `WorkerLost`, and the shard is tried again as a whole. The kernel's memory killer looks the same whether the video is at fault or not.

An error of the storage below a decoder goes to the owner as it is. So does the time limit, as `StorageUnavailable`, where the decoder
spent most of it inside reads of its file: the mount hangs, not the codec.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from os.path import join
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.engine.decoders.lane_state import Job, LaneState
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.start_ups import StartUps
from pipeline.errors import (
    BadDataError,
    LatheError,
    SourceChanged,
    StorageUnavailable,
    WorkerLost,
)
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, Sample, VideoEnded
from pipeline.storage import locate
from pipeline.video import clips
from pipeline.video.cutting import CutRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import DecodeConfig, DrillConfig
    from pipeline.engine.decoders.lanes import Answer, Lanes
    from pipeline.records import ChunkShape, ClipPlan, ClipRules

STEPS_AHEAD = (
    8  # encode steps' worth of chunks waiting: more would not make the encoder faster, only the process larger
)
PULLS_AHEAD = 2  # chunks asked of a lane beyond what has arrived: one being decoded, one on its way
JOIN_S = 5.0  # for the thread to end
TRIES = 2  # decoders a video may bring down before the rest of it is rejected
OUTSIDE_KILLS = 5  # decoders killed from outside on one video before its owner is told to try again as a whole
KILL_PAUSE_S = 1.0  # before a video is decoded again after its second kill from outside; doubled each time


class Source(Protocol):
    """Where samples come from: `next_sample` gives `(owner, sample)` or None if there is none at the moment."""

    def next_sample(self) -> tuple[Any, Sample] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sample. The last one of a sample is `VideoEnded`, a `Reject` of all that is left of it, or a
    `LatheError` that is not the video's fault (`StorageUnavailable`, `SourceChanged`, `WorkerLost`, …): the owner fails as a whole.
    """

    owner: Any
    sample: Sample
    what: OpenedVideo | FrameChunk | ClipFailed | VideoEnded | Restarted | Reject | LatheError


@dataclass(frozen=True, slots=True)
class Restarted:
    """The video starts again from its first frame after its decoder died: unfinished clips are void, finished ones stand."""


class Feed:
    """Drives `lanes`. `start` runs it in a thread; `events` takes what happened; `consumed` gives budget back."""

    def __init__(
        self,
        lanes: Lanes,
        source: Source,
        *,
        rules: ClipRules,
        limits: DecodeConfig,
        drill: DrillConfig,
        chunk_frames: int,
        frame_bytes: int,
        largest_batch: Callable[[ChunkShape], int],
        etag_of: Callable[[Any, Sample], str | None] = lambda owner, sample: None,
        paused: Callable[[Any], bool] = lambda owner: False,  # whether an owner wants no further chunk for now
        headers_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`etag_of` gives the etag of the object that a sample of an owner came from, for decoders that fetch it themselves.
        With `headers_only` a video ends once it is open: no clip of it is cut, and its `VideoEnded` says nothing of work done.
        """
        self._lanes = lanes
        self._source = source
        self._rules = rules
        self._limits = limits
        self._drill = drill
        self._chunk_frames = chunk_frames
        self._frame_bytes = frame_bytes
        self._largest_batch = largest_batch
        self._etag_of = etag_of
        self._paused = paused
        self._headers_only = headers_only
        self._clock = clock
        self._looked_at = clock()
        self._state = [LaneState(started_at=self._looked_at) for _ in range(lanes.count)]
        self._again: deque[Job] = deque()
        self._tickets = 0
        self._start_ups = StartUps(lanes.count)
        self._lock = threading.Lock()
        self._held_bytes = 0  # handed out as events and not yet consumed
        self._cancelled: list[Any] = []
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self.failure: BaseException | None = None  # what ended the thread
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends the lanes, then the thread: it may be sending a video to a process that does not read."""
        self._stop.set()
        self._lanes.close()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    @property
    def decoding(self) -> bool:
        """Whether an answer is outstanding anywhere."""
        return any(lane.asked for lane in self._state)

    @property
    def ready_lanes(self) -> int:
        """Decoder processes that are up."""
        return sum(lane.ready for lane in self._state)

    def consumed(self, num_bytes: int) -> None:
        """Planes of this size are gone; as many may be decoded again."""
        with self._lock:
            self._held_bytes -= num_bytes

    def cancel(self, owner: Any) -> None:
        """Forgets everything of `owner`. Events already emitted may still arrive; the caller drops them."""
        with self._lock:
            self._cancelled.append(owner)

    def wake(self) -> None:
        """Ends a wait in `events`, now or the next, from any thread: its caller has something else to look at."""
        self._events.put(None)

    def events(self, wait_s: float) -> list[Event]:
        """What has happened since the last call, in order; waits up to `wait_s` for the first. Raises what the thread raised."""
        items: list[Event | BaseException | None] = []
        try:
            items.append(self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait())
            while True:
                items.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [item for item in items if isinstance(item, Event)]

    def pump(self, wait_s: float) -> list[Event]:
        """One turn: hands out samples, asks for chunks, collects answers for up to `wait_s`. The thread calls it again and again."""
        self._forget_cancelled()
        self._start_again()
        self._assign()
        self._ask()
        events = []
        for lane, ticket, answer in self._lanes.wait(wait_s):
            if isinstance(answer, LaneReady):
                self._state[lane].ready, self._state[lane].restart_at = True, None
                self._start_ups.up(lane)
            elif ticket in (self._state[lane].ticket, -1):
                events += self._answer(lane, answer)
        events += self._late()
        with self._lock:
            self._held_bytes += sum(event.what.nbytes for event in events if isinstance(event.what, FrameChunk))
        return events

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                # Nothing announces a sample that has been read: an idle feed looks more often.
                for event in self.pump(0.02 if self.decoding else 0.005):
                    self._events.put(event)
        except BaseException as error:  # noqa: BLE001 - handed to the owner's thread, which raises it
            self.failure = error
            self._events.put(error)

    def _forget_cancelled(self) -> None:
        with self._lock:
            owners, self._cancelled = self._cancelled, []
        for owner in owners:
            self._again = deque(job for job in self._again if job.owner is not owner)
            for index, lane in enumerate(self._state):
                if lane.job is None or lane.job.owner is not owner:
                    continue
                if lane.asked:
                    # Its process owes an answer and may be stuck for good.
                    self._restart(index)
                else:
                    self._release(lane)

    def _start_again(self) -> None:
        now = self._clock()
        for index, lane in enumerate(self._state):
            if lane.restart_at is not None and lane.restart_at <= now:
                self._restart(index)

    def _assign(self) -> None:
        for index, lane in enumerate(self._state):
            if not lane.idle:
                continue
            job = self._next_job()
            if job is None:
                return
            self._tickets += 1
            lane.job, lane.ticket = job, self._tickets
            lane.opened, lane.asked = None, 1
            lane.heard(self._clock())
            video, etag = job.sample.encoded_video, self._etag_of(job.owner, job.sample)
            frames, headers_only = self._chunk_frames, self._headers_only
            request = CutRequest(video, self._rules, self._limits, frames, self._drill, etag, headers_only)
            self._lanes.open(index, lane.ticket, request)

    def _next_job(self) -> Job | None:
        now = self._clock()
        for job in self._again:
            if job.not_before <= now:
                self._again.remove(job)
                return job
        item = self._source.next_sample()
        return Job(*item) if item is not None else None

    def _ask(self) -> None:
        # One chunk is always allowed, else nothing would move.
        with self._lock:
            expected = self._held_bytes
        expected += sum(lane.asked * lane.chunk_bytes for lane in self._state)
        most = min(self._frame_bytes, max(lane.enough_bytes for lane in self._state))
        # Lanes with the fewest outstanding answers first, so that a tight budget is shared.
        for index, lane in sorted(enumerate(self._state), key=lambda item: item[1].asked):
            while lane.opened is not None and lane.asked < PULLS_AHEAD and not self._is_paused(lane):
                if lane.chunk_bytes and expected and expected + lane.chunk_bytes > most:
                    return
                if lane.asked == 0:
                    lane.heard(self._clock())
                lane.asked += 1
                expected += lane.chunk_bytes
                self._lanes.pull(index, lane.ticket)

    def _is_paused(self, lane: LaneState) -> bool:
        return lane.job is not None and self._paused(lane.job.owner)

    def _answer(self, index: int, answer: Answer) -> list[Event]:
        lane = self._state[index]
        if isinstance(answer, WorkerLost):
            return self._lost(index, "decoder_crashed", answer)
        if lane.job is None:
            return []
        owner, sample = lane.job.owner, lane.job.sample
        lane.asked -= 1
        lane.heard(self._clock())
        if isinstance(answer, LatheError):
            self._release(lane)
            if isinstance(answer, BadDataError):
                recovered = answer.frames_recovered
                return [Event(owner, sample, Reject.from_error(answer, sample, "decode", frames_recovered=recovered))]
            return [Event(owner, sample, _of_a_copy(answer, sample))]
        if isinstance(answer, LaneReady):
            raise TypeError(f"unexpected answer {answer!r}")
        event = Event(owner, sample, answer)
        if isinstance(answer, OpenedVideo) and self._headers_only:
            self._release(lane)
            return [event, Event(owner, sample, VideoEnded(0, 0.0))]
        if isinstance(answer, OpenedVideo):
            self._expect(lane, answer)
        elif isinstance(answer, VideoEnded):
            self._release(lane)
        return [event]

    def _expect(self, lane: LaneState, opened: OpenedVideo) -> None:
        shapes = [self._largest_chunk(plan, opened) for plan in opened.clips]
        frames, height, width = max(shapes, key=math.prod, default=(0, 0, 0))
        lane.opened, lane.chunk_bytes = opened, frames * height * width * 3
        batch = self._largest_batch((False, frames, height, width)) if shapes else 0
        lane.enough_bytes = lane.chunk_bytes * max(STEPS_AHEAD * batch, (PULLS_AHEAD + 1) * len(self._state))

    def _largest_chunk(self, plan: ClipPlan, opened: OpenedVideo) -> tuple[int, int, int]:
        """Frames, height and width. No chunk is longer than its clip: `chunk_frames` may say any length (clips encoded whole)."""
        rules, info, bucket = self._rules, opened.info, plan.bucket
        frames = bucket.frames
        if not frames:  # the whole video; its duration is rounded, so this is an estimate
            available = clips.grid_length(info.num_frames, info.duration_s, rules.fps) - plan.start
            frames = max(rules.time_stride, clips.whole_frames(available, rules.time_stride, rules.lead_frames))
        return min(self._chunk_frames + 1, frames), bucket.height, bucket.width

    def _late(self) -> list[Event]:
        events = []
        now, limit = self._clock(), self._limits.timeout_s
        since_last_look, self._looked_at = now - self._looked_at, now
        for index, lane in enumerate(self._state):
            if not lane.ready and lane.restart_at is None and now - lane.started_at > self._lanes.start_limit_s:
                text = f"decoder process was not up {self._lanes.start_limit_s:g} s after its start"
                events += self._lost(index, "", WorkerLost(text, blame=True, stage="decode"))
            if lane.job is None or not lane.asked:
                continue
            if self._lanes.receiving(index):
                lane.heard(now)
                continue
            if self._lanes.reading(index):
                lane.read_s += since_last_look
            if now - lane.answered_at <= limit:
                continue
            if lane.read_s > limit / 2:
                events += self._cannot_read(index, lane.job)
            else:
                lost = WorkerLost(f"no answer from the decoder in {limit:g} s", blame=True, stage="decode")
                events += self._lost(index, "decode_timeout", lost)
        return events

    def _cannot_read(self, index: int, job: Job) -> list[Event]:
        """The process may stay in its read for as long as the mount hangs; another one takes the lane."""
        spent, sample = self._state[index].read_s, job.sample
        self._restart(index)
        text = f"a decoder waited {spent:.0f} s of {self._limits.timeout_s:g} s (decode.timeout_s) for reads of {sample.key}"
        return [Event(job.owner, sample, StorageUnavailable(text, uri=sample.uri, key=sample.key, stage="decode"))]

    def _lost(self, index: int, reason: str, error: WorkerLost) -> list[Event]:
        """Replaces a lane's process. `reason` is for the reject that a video gets that brought down too many."""
        lane = self._state[index]
        job = lane.job
        if lane.ready:
            self._restart(index)
        else:
            pause = self._start_ups.died(index, error, others_up=self.ready_lanes > 0, now=self._clock())
            self._state[index] = LaneState(ticket=lane.ticket, restart_at=self._clock() + pause)
        if job is None:
            return []
        owner, sample = job.owner, job.sample
        deaths, kills = job.deaths + error.blame, job.kills + (not error.blame)
        if deaths >= TRIES:
            text = f"{error.message}, {deaths} times"
            return [Event(owner, sample, Reject(sample.key, "decode", reason, text, policy=False, uri=sample.uri))]
        if kills >= OUTSIDE_KILLS:
            text = f"{kills} decoders were lost on {sample.key}, none by a crash; the last: {error.message}"
            return [Event(owner, sample, WorkerLost(text, uri=sample.uri, key=sample.key, stage="decode"))]
        pause = 0.0 if error.blame or kills < 2 else KILL_PAUSE_S * 2 ** (kills - 2)
        self._again.append(Job(owner, sample, deaths, kills, self._clock() + pause))
        return [Event(owner, sample, Restarted())]

    def _restart(self, index: int) -> None:
        self._state[index] = LaneState(ticket=self._state[index].ticket, started_at=self._clock())
        self._lanes.restart(index)

    def _release(self, lane: LaneState) -> None:
        lane.job = lane.opened = None
        lane.asked = lane.chunk_bytes = lane.enough_bytes = 0
        # Answers to pulls made beyond the end carry the old ticket and are dropped.
        self._tickets += 1
        lane.ticket = self._tickets


def _of_a_copy(error: LatheError, sample: Sample) -> LatheError:
    """Where a temporary copy of a video is gone, its source is as it was: the next attempt makes another copy."""
    if not isinstance(error, SourceChanged) or sample.video == join(*locate(sample.uri)):
        return error
    return StorageUnavailable(
        f"the temporary copy of {sample.key} is gone: {error.message}", uri=sample.uri, stage="decode"
    )

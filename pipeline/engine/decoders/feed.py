"""Thread that feeds one encoder's decoder processes. Takes samples from a `Source`, emits `Event`s, each with the owner of its sample.

Decoded bytes in flight never exceed `frame_bytes`. A decoder that dies or gives no answer within `decode.timeout_s` is replaced, see
`losses`. An error of the storage below a decoder goes to the owner unchanged. The time limit becomes `StorageUnavailable` where the decoder
spent most of it inside reads of its file: then the mount hangs, not the codec.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.engine.decoders.lane_state import Job, LaneState
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.decoders.losses import Restarted, after_error, after_loss
from pipeline.engine.decoders.start_ups import StartUps
from pipeline.errors import LatheError, StorageUnavailable, WorkerLost
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, Sample, StillOpening, VideoEnded
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


class Source(Protocol):
    """Supplier of samples: `next_sample` returns `(owner, sample)`, or None if there is none at the moment."""

    def next_sample(self) -> tuple[Any, Sample] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a sample. Its last event is `VideoEnded`, a `Reject` of all that is left of it, or a `LatheError` that is not the video's
    fault (`StorageUnavailable`, `SourceChanged`, `WorkerLost`, …), after which its owner fails.
    """

    owner: Any
    sample: Sample
    what: OpenedVideo | FrameChunk | ClipFailed | VideoEnded | Restarted | Reject | LatheError


class Feed:
    """Drives `lanes`. `start` runs it in a thread; `events` takes its events; `consumed` returns their bytes to the budget."""

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
        paused: Callable[[Any], bool] = lambda owner: False,  # whether an owner wants no chunk at the moment
        headers_only: bool = False,
        first_frame: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`etag_of` gives the etag of the object that a sample of an owner came from, for decoders that fetch it themselves.
        With `headers_only` a video ends once it is open: no clip is cut, and the numbers of its `VideoEnded` are 0. `first_frame`: first
        chunks carry their first frame as an image file.
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
        self._headers_only, self._first_frame = headers_only, first_frame
        self._clock = clock
        self._turn_at = clock()
        self._state = [LaneState(started_at=self._turn_at) for _ in range(lanes.count)]
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
        """Ends the lanes, then the thread: the thread may be sending a video to a process that does not read."""
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
        """Planes of this size were freed: as many bytes may be decoded again."""
        with self._lock:
            self._held_bytes -= num_bytes

    def cancel(self, owner: Any) -> None:
        """Drops all samples of `owner`. Events already emitted may still arrive; the caller ignores them."""
        with self._lock:
            self._cancelled.append(owner)

    def wake(self) -> None:
        """Ends the present or next wait in `events`, from any thread, so that its caller can look at something else."""
        self._events.put(None)

    def events(self, wait_s: float) -> list[Event]:
        """Events since the last call, in order; waits up to `wait_s` for the first. Raises what the thread raised."""
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
                # No event announces a sample that was read, so an idle feed polls more often.
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
                    # Its process has not answered yet and may hang.
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
            lane.restart_time_limit(self._clock())
            video, etag = job.sample.encoded_video, self._etag_of(job.owner, job.sample)
            frames, flags = self._chunk_frames, (self._headers_only, self._first_frame)
            request = CutRequest(video, self._rules, self._limits, frames, self._drill, etag, *flags)
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
        # One chunk is always allowed, else decoding would stop.
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
                    lane.restart_time_limit(self._clock())
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
        lane.restart_time_limit(self._clock())
        if isinstance(answer, LatheError):
            self._release(lane)
            return [Event(owner, sample, after_error(sample, answer))]
        if isinstance(answer, LaneReady):
            raise TypeError(f"unexpected answer {answer!r}")
        if isinstance(answer, StillOpening):
            lane.asked += 1
            self._lanes.pull(index, lane.ticket)
            return []
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
        """Frames, height and width. No chunk is longer than its clip; `chunk_frames` may be larger (clips encoded whole)."""
        rules, info, bucket = self._rules, opened.info, plan.bucket
        frames = bucket.frames
        if not frames:  # the whole video; its duration is rounded, so this is an estimate
            available = clips.grid_length(info.num_frames, info.duration_s, rules.fps)
            frames = max(rules.time_stride, clips.frames_of(plan, available, rules))
        return min(self._chunk_frames + 1, frames), bucket.height, bucket.width

    def _late(self) -> list[Event]:
        events = []
        now, limit = self._clock(), self._limits.timeout_s
        since_last_turn, self._turn_at = now - self._turn_at, now
        for index, lane in enumerate(self._state):
            if not lane.ready and lane.restart_at is None and now - lane.started_at > self._lanes.start_limit_s:
                text = f"decoder process was not up {self._lanes.start_limit_s:g} s after its start"
                events += self._lost(index, "", WorkerLost(text, blame=True, stage="decode"))
            if lane.job is None or not lane.asked:
                continue
            if self._lanes.receiving(index):
                lane.restart_time_limit(now)
                continue
            if self._lanes.reading(index):
                lane.read_s += since_last_turn
            if now - lane.answered_at <= limit:
                continue
            if lane.read_s > limit / 2:
                events += self._cannot_read(index, lane.job)
            else:
                lost = WorkerLost(f"no answer from the decoder in {limit:g} s", blame=True, stage="decode")
                events += self._lost(index, "decode_timeout", lost)
        return events

    def _cannot_read(self, index: int, job: Job) -> list[Event]:
        """Another process takes the lane: the old one stays in its read for as long as the mount hangs."""
        spent, sample = self._state[index].read_s, job.sample
        self._restart(index)
        text = f"a decoder waited {spent:.0f} s of {self._limits.timeout_s:g} s (decode.timeout_s) for reads of {sample.key}"
        return [Event(job.owner, sample, StorageUnavailable(text, uri=sample.uri, key=sample.key, stage="decode"))]

    def _lost(self, index: int, reason: str, error: WorkerLost) -> list[Event]:
        """Replaces a lane's process. `reason`: slug of the reject, if the video has ended too many decoders."""
        lane = self._state[index]
        job = lane.job
        if lane.ready:
            self._restart(index)
        else:
            pause = self._start_ups.died(index, error, others_up=self.ready_lanes > 0, now=self._clock())
            self._state[index] = LaneState(ticket=lane.ticket, restart_at=self._clock() + pause)
        if job is None:
            return []
        what, again = after_loss(job, reason, error, self._clock())
        if isinstance(what, Restarted):
            self._again.append(again)
        return [Event(job.owner, job.sample, what)]

    def _restart(self, index: int) -> None:
        self._state[index] = LaneState(ticket=self._state[index].ticket, started_at=self._clock())
        self._lanes.restart(index)

    def _release(self, lane: LaneState) -> None:
        lane.job = lane.opened = None
        lane.asked = lane.chunk_bytes = lane.enough_bytes = 0
        # Answers to pulls beyond the end carry the old ticket and are dropped.
        self._tickets += 1
        lane.ticket = self._tickets

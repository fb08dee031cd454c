"""Keeps the decoders of one encoder busy, in a thread of its own: samples in, events out, by pull and within a byte budget.

Enters: samples from whoever owns them (a `Source`), answers from `Lanes`. Leaves: events, each with the owner of its sample.
A decoder that dies or gives no answer within `decode.timeout_s` is replaced and its video tried once more from the start
(`Restarted`); a second failure rejects what is left of it. Decoding is deterministic, so the owner drops what it already has.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline import clips
from pipeline.cutting import CutRequest
from pipeline.engine.lanes import LaneReady
from pipeline.errors import BadDataError, BuildError, LatheError, PolicyReject
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, Sample, VideoEnded

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import DecodeConfig, DrillConfig
    from pipeline.engine.batching import Shape
    from pipeline.engine.lanes import Answer, Lanes
    from pipeline.records import ClipPlan, ClipRules

STEPS_AHEAD = (
    8  # encode steps' worth of chunks waiting: more would not make the encoder faster, only the process larger
)
PULLS_AHEAD = 2  # chunks asked of a lane beyond what has arrived: one being decoded, one on its way
STILLBORN = (
    6  # decoder processes that die on start-up, one after the other, before the build stops: it is not the videos
)
TRIES = 2  # decoder deaths a video may cause before it is rejected


class Source(Protocol):
    """Where samples come from: `next_sample` gives `(owner, sample)` or None if there is none at the moment."""

    def next_sample(self) -> tuple[Any, Sample] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sample. `what` is an `OpenedVideo`, `FrameChunk`, `ClipFailed`, `VideoEnded`, `Restarted` or a
    `Reject` of the whole rest of the video.
    """

    owner: Any
    sample: Sample
    what: OpenedVideo | FrameChunk | ClipFailed | VideoEnded | Restarted | Reject


@dataclass(frozen=True, slots=True)
class Restarted:
    """The video starts again from its first frame after its decoder died: unfinished clips are void, finished ones stand."""


@dataclass(slots=True)
class _Lane:
    ready: bool = False  # its process is up
    owner: Any = None
    sample: Sample | None = None  # None: idle
    ticket: int = 0
    deaths: int = 0
    opened: OpenedVideo | None = None
    asked: int = 0  # answers outstanding
    chunk_bytes: int = 0  # largest answer to expect
    enough_bytes: int = 0  # chunks like these that keep the encoder busy
    answered_at: float = 0.0

    @property
    def idle(self) -> bool:
        return self.ready and self.sample is None


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
        largest_batch: Callable[[Shape], int],
        paused: Callable[[Any], bool] = lambda owner: False,  # whether an owner wants no further chunk for now
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = lanes
        self._source = source
        self._rules = rules
        self._limits = limits
        self._drill = drill
        self._chunk_frames = chunk_frames
        self._frame_bytes = frame_bytes
        self._largest_batch = largest_batch
        self._paused = paused
        self._clock = clock
        self._state = [_Lane() for _ in range(lanes.count)]
        self._again: deque[tuple[Any, Sample, int]] = deque()  # videos to try again: owner, sample, deaths
        self._tickets = 0
        self._stillborn = 0  # lanes in a row that died before they were up
        self._lock = threading.Lock()
        self._held_bytes = 0  # handed out as events and not yet consumed
        self._cancelled: list[Any] = []
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; the lanes stay the caller's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

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
        self._assign()
        self._ask()
        events = []
        for lane, ticket, answer in self._lanes.wait(wait_s):
            if isinstance(answer, LaneReady):
                self._state[lane].ready = True
                self._stillborn = 0
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
            self._events.put(error)

    def _forget_cancelled(self) -> None:
        with self._lock:
            owners, self._cancelled = self._cancelled, []
        for owner in owners:
            self._again = deque(item for item in self._again if item[0] is not owner)
            for index, lane in enumerate(self._state):
                if lane.sample is None or lane.owner is not owner:
                    continue
                if lane.asked:
                    # Its process owes an answer and may be stuck for good: sending it another video could block this thread.
                    self._restart(index)
                else:
                    self._release(lane)

    def _assign(self) -> None:
        for index, lane in enumerate(self._state):
            if not lane.idle:
                continue
            if self._again:
                owner, sample, deaths = self._again.popleft()
            elif (item := self._source.next_sample()) is not None:
                (owner, sample), deaths = item, 0
            else:
                return
            self._tickets += 1
            lane.owner, lane.sample, lane.deaths, lane.ticket = owner, sample, deaths, self._tickets
            lane.opened, lane.asked, lane.answered_at = None, 1, self._clock()
            self._lanes.open(
                index, lane.ticket, CutRequest(sample, self._rules, self._limits, self._chunk_frames, self._drill)
            )

    def _ask(self) -> None:
        # One chunk is always allowed, else nothing would move.
        with self._lock:
            expected = self._held_bytes
        expected += sum(lane.asked * lane.chunk_bytes for lane in self._state)
        most = min(self._frame_bytes, max(lane.enough_bytes for lane in self._state))
        # Lanes with the fewest outstanding answers first, so that a tight budget is shared.
        for index, lane in sorted(enumerate(self._state), key=lambda item: item[1].asked):
            while lane.opened is not None and lane.asked < PULLS_AHEAD and not self._paused(lane.owner):
                if lane.chunk_bytes and expected and expected + lane.chunk_bytes > most:
                    return
                if lane.asked == 0:
                    lane.answered_at = self._clock()
                lane.asked += 1
                expected += lane.chunk_bytes
                self._lanes.pull(index, lane.ticket)

    def _answer(self, index: int, answer: Answer) -> list[Event]:
        lane = self._state[index]
        sample = lane.sample
        if isinstance(answer, LatheError) and not isinstance(answer, BadDataError):
            return self._lost(index, "decoder_crashed", answer.message)
        if sample is None:
            return []
        lane.asked -= 1
        lane.answered_at = self._clock()
        if isinstance(answer, BadDataError):
            event = Event(lane.owner, sample, _reject(sample, answer))
            self._release(lane)
            return [event]
        if isinstance(answer, LatheError | LaneReady):
            raise TypeError(f"unexpected answer {answer!r}")
        event = Event(lane.owner, sample, answer)
        if isinstance(answer, OpenedVideo):
            self._expect(lane, answer)
        elif isinstance(answer, VideoEnded):
            self._release(lane)
        return [event]

    def _expect(self, lane: _Lane, opened: OpenedVideo) -> None:
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
        now = self._clock()
        for index, lane in enumerate(self._state):
            if lane.sample is not None and lane.asked and now - lane.answered_at > self._limits.timeout_s:
                events += self._lost(
                    index, "decode_timeout", f"no answer from the decoder in {self._limits.timeout_s:g} s"
                )
        return events

    def _lost(self, index: int, reason: str, message: str) -> list[Event]:
        lane = self._state[index]
        owner, sample, deaths = lane.owner, lane.sample, lane.deaths + 1
        if not lane.ready:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                raise BuildError(f"{STILLBORN} decoder processes in a row died before they were up; last: {message}")
        self._restart(index)
        if sample is None:
            return []
        if deaths < TRIES:
            self._again.append((owner, sample, deaths))
            return [Event(owner, sample, Restarted())]
        text = f"{message}, {deaths} times"
        return [Event(owner, sample, Reject(sample.key, "decode", reason, text, policy=False, uri=sample.uri))]

    def _restart(self, index: int) -> None:
        self._state[index] = _Lane(ticket=self._state[index].ticket)
        self._lanes.restart(index)

    def _release(self, lane: _Lane) -> None:
        lane.owner = lane.sample = lane.opened = None
        lane.asked = lane.chunk_bytes = lane.enough_bytes = 0
        # Answers to pulls made beyond the end carry the old ticket and are dropped.
        self._tickets += 1
        lane.ticket = self._tickets


def _reject(sample: Sample, error: BadDataError) -> Reject:
    return Reject(
        sample.key,
        error.stage or "decode",
        error.reason,
        error.message,
        policy=isinstance(error, PolicyReject),
        uri=sample.uri,
        frames_recovered=error.frames_recovered,
    )

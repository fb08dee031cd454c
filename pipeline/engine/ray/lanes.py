"""`Lanes` as Ray actors: each owns a `LaneWorker`, on the encoder's node if it has free CPUs, else on any node.

Frames travel through Ray's object store. Ray does not restart the actors: the feed decides that, and must know why one died. Ray reports a
crash and a kill alike ("connection error code 2"), so each actor keeps a `CrashReport` on its machine.

A video in a temporary file does not exist on another node. If it lies uncompressed in an object of an object store, the decoder there
fetches it. Any other video, and one whose fetch fails, is sent in pieces of `PIECE_BYTES`, one piece at a time for each lane.
Paired videos go along with the request to open.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.engine.decoders.arrival import Arrival
from pipeline.engine.decoders.crash_report import CrashReport, take_report
from pipeline.engine.decoders.exit_status import lost_by, lost_by_report
from pipeline.engine.decoders.lane_worker import LaneWorker
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.errors import LatheError, StorageUnavailable, WorkerLost
from pipeline.storage import is_remote
from pipeline.video.decode import read_mark

if TYPE_CHECKING:
    import mmap

    from pipeline.config import StorageConfig
    from pipeline.engine.decoders.lanes import Answer
    from pipeline.records import EncodedVideo
    from pipeline.video.cutting import CutRequest

PIECE_BYTES = 8 * 1024 * 1024
REPORT_S = 20.0  # for another node to say whether a decoder crashed; without an answer it counts as killed from outside


@ray.remote(max_restarts=0, max_task_retries=0)
class DecoderActor:
    """One lane in a process of its own: a crash or a hang in a codec ends this process only."""

    def __init__(self, memory_bytes: int, niceness: int) -> None:
        self._report = CrashReport()
        read_mark.share(self._report.mark)
        self._worker = LaneWorker(memory_bytes, niceness)
        self._arrival = Arrival()

    def place(self) -> tuple[str, str, str]:
        """The node it runs on, and the paths of its crash report and of its read mark there."""
        return str(ray.get_runtime_context().get_node_id()), self._report.path, self._report.mark_path

    def fetch(self, sample: EncodedVideo, etag: str, storage: StorageConfig) -> LatheError | None:
        """Fetches the video of `sample`, whose `span` must be known, from its source object."""
        try:
            self._worker.close()
            if sample.span is None:
                raise ValueError(f"{sample!r} has no span to fetch")
            self._arrival.fetch(sample.uri, etag, sample.span, storage)
        except LatheError as error:
            return error
        except (MemoryError, RuntimeError) as error:  # RuntimeError: no further thread
            return _exhausted(error)
        return None

    def append(self, piece: bytes, first: bool) -> LatheError | None:
        """Receives the next piece of a video."""
        try:
            if first:
                self._worker.close()
            self._arrival.append(piece, first)
        except LatheError as error:
            return error
        except (MemoryError, RuntimeError) as error:
            return _exhausted(error)
        return None

    def open(self, request: CutRequest, arrived: bool) -> Answer:
        """See `LaneWorker.open`. With `arrived` the video is the one that `fetch` or `append` received."""
        if arrived:
            request = replace(request, video=replace(request.video, video=self._arrival.video))
        else:
            self._arrival.drop()
        return self._worker.open(request)

    def pull(self) -> Answer:
        """See `LaneWorker.pull`."""
        return self._worker.pull()


_take_report = ray.remote(num_cpus=0, max_retries=0)(take_report)


@dataclass(slots=True)
class _Asked:
    """A call to a lane's actor (`report`: to its node), with what the next step needs."""

    ref: Any
    kind: Literal["place", "answer", "fetch", "piece", "report"]
    ticket: int = -1
    request: CutRequest | None = None  # to open once the video has arrived
    path: str = ""  # of the video on this node
    file: BinaryIO | None = None  # the video, open at the next piece
    lost: WorkerLost | None = None  # the loss if no report comes
    deadline: float = 0.0


class RayLanes:
    """See the module."""

    def __init__(self, count: int, memory_bytes: int, niceness: int, cpus: float, storage: StorageConfig) -> None:
        self.count = count
        self.start_limit_s = math.inf  # an actor may wait for a node without limit
        self._niceness = niceness
        self._memory_bytes = memory_bytes
        self._cpus = cpus
        self._storage = storage
        self._home = ray.get_runtime_context().get_node_id()
        self._closed = False
        self._actors: list[Any] = [None] * count
        self._places: list[tuple[str, str] | None] = [None] * count
        self._marks: list[mmap.mmap | None] = [None] * count  # of actors on this node, see `read_mark`
        self._asked: list[deque[_Asked]] = [deque() for _ in range(count)]
        self._failed: list[tuple[int, int, Answer]] = []  # calls that could not be made
        for lane in range(count):
            self._create(lane)

    def open(self, lane: int, ticket: int, request: CutRequest) -> None:  # noqa: D102
        place = self._places[lane]
        here = place is None or place[0] == self._home
        if not here and request.video.members:
            try:
                request = replace(request, video=_with_member_bytes(request.video))
            except OSError as error:
                self._failed.append((lane, ticket, _unsent(str(error.filename), request.video, error)))
                return
        video = request.video
        if isinstance(video.video, bytes) or here:
            self._ask(lane, "open", (request, False), _Asked(None, "answer", ticket))
            return
        there = replace(request, video=replace(video, video=b""))
        if is_remote(video.uri) and video.span is not None and request.etag is not None:
            asked = _Asked(None, "fetch", ticket, there, video.video)
            self._ask(lane, "fetch", (there.video, request.etag, self._storage), asked)
        else:
            self._send(lane, ticket, there, video.video)

    def pull(self, lane: int, ticket: int) -> None:  # noqa: D102
        self._ask(lane, "pull", (), _Asked(None, "answer", ticket))

    def receiving(self, lane: int) -> bool:  # noqa: D102
        return bool(self._asked[lane]) and self._asked[lane][0].kind in ("fetch", "piece")

    def reading(self, lane: int) -> bool:
        """Known for actors on this node only. Others read copies on their own disks, or files that all nodes mount."""
        mark = self._marks[lane]
        return mark is not None and mark[0] != 0

    def wait(self, timeout_s: float) -> list[tuple[int, int, Answer]]:  # noqa: D102
        if self._failed:
            failed, self._failed = self._failed, []
            return failed
        refs = [asked.ref for lane in self._asked for asked in lane]
        if not refs:
            threading.Event().wait(timeout_s)
            return []
        ray.wait(refs, num_returns=1, timeout=timeout_s)
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        answers: list[tuple[int, int, Answer]] = []
        for lane, queue in enumerate(self._asked):
            while queue and (queue[0].ref in done or 0 < queue[0].deadline < time.monotonic()):
                found = self._take(lane, queue.popleft())
                answers += found
                if found and isinstance(found[0][2], WorkerLost):
                    self._clear(lane)  # further calls are lost as well; the loss is reported once
        return answers

    def restart(self, lane: int) -> None:  # noqa: D102
        ray.kill(self._actors[lane], no_restart=True)
        self._clear(lane)
        self._drop_report(lane)
        if not self._closed:
            self._create(lane)

    def close(self) -> None:  # noqa: D102
        self._closed = True
        for lane, actor in enumerate(self._actors):
            ray.kill(actor, no_restart=True)
            self._drop_report(lane)

    def _create(self, lane: int) -> None:
        near = NodeAffinitySchedulingStrategy(self._home, soft=True)
        self._places[lane] = self._marks[lane] = None
        options = {"num_cpus": self._cpus, "num_gpus": 0, "scheduling_strategy": near}
        self._actors[lane] = DecoderActor.options(**options).remote(self._memory_bytes, self._niceness)  # type: ignore[attr-defined]
        self._ask(lane, "place", (), _Asked(None, "place"))

    def _ask(self, lane: int, method: str, arguments: tuple[Any, ...], asked: _Asked) -> None:
        try:
            asked.ref = getattr(self._actors[lane], method).remote(*arguments)
        except RayError as error:  # the object store is full, or Ray ends: it concerns this lane, not the feed
            self._failed.append((lane, -1, _lost(error)))
            return
        self._asked[lane].append(asked)

    def _send(self, lane: int, ticket: int, request: CutRequest, path: str) -> None:
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed when all is sent, or by `_clear`
        except OSError as error:
            self._failed.append((lane, ticket, _unsent(path, request.video, error)))
            return
        self._send_piece(lane, _Asked(None, "piece", ticket, request, path, file), first=True)

    def _send_piece(self, lane: int, asked: _Asked, *, first: bool = False) -> None:
        """The next piece; after the last one, `open`."""
        if asked.file is None or asked.request is None:
            raise RuntimeError(f"no video to send: {asked}")
        try:
            piece = asked.file.read(PIECE_BYTES)
        except OSError as error:
            asked.file.close()
            self._failed.append((lane, asked.ticket, _unsent(asked.path, asked.request.video, error)))
            return
        if piece:
            self._ask(lane, "append", (piece, first), asked)
        else:
            asked.file.close()
            self._ask(lane, "open", (asked.request, True), _Asked(None, "answer", asked.ticket))

    def _take(self, lane: int, asked: _Asked) -> list[tuple[int, int, Answer]]:
        """The answers that follow from a call that has returned or is past its deadline."""
        if asked.kind == "report":
            return [(lane, -1, _reported(asked))]
        try:
            answer = ray.get(asked.ref)
        except RayError as error:
            if asked.file is not None:
                asked.file.close()
            self._clear(lane)
            return self._inquire(lane, error)
        if asked.kind == "place":
            node, report, mark = answer
            self._places[lane] = node, report
            self._marks[lane] = _look(mark) if node == self._home else None
            return [(lane, -1, LaneReady())]
        if asked.kind == "fetch" and isinstance(answer, LatheError) and asked.request is not None:
            # That machine may have no credentials, no route, or an outage; this one has a copy of the listed object.
            self._send(lane, asked.ticket, asked.request, asked.path)
            return []
        if asked.kind == "answer" or isinstance(answer, LatheError):
            if asked.file is not None:
                asked.file.close()
            return [(lane, asked.ticket, answer)]
        if asked.kind == "piece":
            self._send_piece(lane, asked)
        else:
            self._ask(lane, "open", (asked.request, True), _Asked(None, "answer", asked.ticket))
        return []

    def _inquire(self, lane: int, error: RayError) -> list[tuple[int, int, Answer]]:
        """Why the lane's actor died: known to Ray or to this machine, else the crash report is read on the actor's node."""
        lost, place = _lost(error), self._places[lane]
        self._places[lane] = None
        if lost.blame or not isinstance(error, ActorDiedError) or error.preempted or place is None:
            return [(lane, -1, lost)]
        node, path = place
        if node == self._home:
            return [(lane, -1, lost_by_report(take_report(path)) or lost)]
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        try:
            ref = _take_report.options(scheduling_strategy=there).remote(path)
        except RayError:
            return [(lane, -1, lost)]
        self._asked[lane].append(_Asked(ref, "report", lost=lost, deadline=time.monotonic() + REPORT_S))
        return []

    def _clear(self, lane: int) -> None:
        for asked in self._asked[lane]:
            if asked.file is not None:
                asked.file.close()
        self._asked[lane].clear()

    def _drop_report(self, lane: int) -> None:
        place = self._places[lane]
        if place is not None and place[0] == self._home:
            take_report(place[1])


def _look(path: str) -> mmap.mmap | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # the actor may have died, and another process deleted its file
        return None
    try:
        return read_mark.look(descriptor)
    finally:
        os.close(descriptor)


def _exhausted(error: Exception) -> WorkerLost:
    """The decoder's machine has no memory or threads left, independent of the video; another process takes the lane."""
    why = str(error) or "no memory"
    return WorkerLost(f"a decoder could not receive a video: {why}", stage="decode")


def _reported(asked: _Asked) -> WorkerLost:
    ready, _ = ray.wait([asked.ref], timeout=0)
    try:
        found = lost_by_report(ray.get(asked.ref)) if ready else None
    except RayError:  # the node was lost as well
        found = None
    return found or asked.lost or WorkerLost("decoder actor lost", stage="decode")


def _with_member_bytes(video: EncodedVideo) -> EncodedVideo:
    """The video with members in memory, at most `decode.max_video_bytes` each: they go along with the request. Raises OSError."""
    held = [
        member if isinstance(member.video, bytes) else replace(member, video=Path(member.video).read_bytes())
        for member in video.members
    ]
    return replace(video, members=tuple(held))


def _unsent(path: str, sample: EncodedVideo, error: OSError) -> StorageUnavailable:
    message = f"{path} cannot be sent to a decoder on another node: {error.strerror or error}"
    return StorageUnavailable(message, uri=sample.uri, key=sample.key, stage="decode")


def _lost(error: RayError) -> WorkerLost:
    """The loss of an actor or of an answer, as Ray describes it."""
    text = " ".join(str(error).split())
    if isinstance(error, RayTaskError):  # an error in Lathe that the video triggers, unless it is Ray's own
        blame = not isinstance(error.cause, RayError | MemoryError)
        return WorkerLost(
            f"decoder failed with {' '.join(repr(error.cause).split())[:200]}", blame=blame, stage="decode"
        )
    if isinstance(error, OutOfMemoryError):
        return WorkerLost("decoder process was killed by Ray's memory monitor", stage="decode")
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            return WorkerLost(f"decoder actor could not start: {text[-200:]}", blame=True, stage="decode")
        if error.preempted:
            return WorkerLost("the node of the decoder was preempted", stage="decode")
        code = re.search(r"exit code (\d+)", text)
        if code and int(code[1]) and "SIGTERM" not in text:
            return lost_by(int(code[1]))
        if "SYSTEM_ERROR" in text:
            return WorkerLost(
                "decoder process was killed from outside (Ray names no signal; no crash report)", stage="decode"
            )
    return WorkerLost(f"decoder actor lost: {type(error).__name__}: {text[:200]}", stage="decode")

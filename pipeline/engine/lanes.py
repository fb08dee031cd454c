"""Decoder processes that may be killed: one video at a time each, one answer for each question.

Takes `CutRequest`s and pulls. Gives answers tagged with lane and ticket. A lane that dies is reported and replaced on request; the feed
drops answers of an earlier ticket. `Lanes` is the contract; `ProcessLanes` runs children of this process over pipes (no Ray);
`ray_lanes` has a second implementation on Ray actors. Both wrap the same `LaneWorker`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.cutting import CutRequest, Cutter
from pipeline.engine.exit_status import lost_by
from pipeline.errors import DamagedInput, LatheError, WorkerLost
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, VideoEnded

if TYPE_CHECKING:
    from collections.abc import Callable

REAP_S = 5.0  # for a process whose pipe has ended to end too
JOIN_S = 5.0  # for the drain thread to end


@dataclass(frozen=True, slots=True)
class LaneReady:
    """The lane's process is up (again) and idle."""


Answer = LaneReady | OpenedVideo | FrameChunk | ClipFailed | VideoEnded | LatheError


class Lanes(Protocol):
    """A set of decoder processes. Calls return at once; answers come from `wait`, in order per lane."""

    count: int

    def open(self, lane: int, ticket: int, request: CutRequest) -> None:
        """Starts a video; the answer is `OpenedVideo` or a `LatheError`. Whatever the lane did before is forgotten."""
        ...

    def pull(self, lane: int, ticket: int) -> None:
        """Asks for one more `FrameChunk`, `ClipFailed` or `VideoEnded`."""
        ...

    def wait(self, timeout_s: float) -> list[tuple[int, int, Answer]]:
        """Answers that have arrived, `(lane, ticket, answer)`; waits up to `timeout_s` for the first.

        `WorkerLost` with ticket -1: the lane died; its `blame` says whether of what it did.
        """
        ...

    def receiving(self, lane: int) -> bool:
        """Whether the opened video is still on its way to the lane, so that the lane cannot have begun to decode it."""
        ...

    def restart(self, lane: int) -> None:
        """Kills the lane's process, whatever it does, and starts another; `LaneReady` follows."""
        ...

    def close(self) -> None:
        """Ends all processes, whatever they do; later calls do nothing. Other threads may still be inside the methods above."""
        ...


class LaneWorker:
    """What runs inside a decoder process, behind a pipe or a Ray actor: one open video, answers instead of exceptions."""

    def __init__(self, memory_bytes: int, niceness: int) -> None:
        limit_address_space(memory_bytes)
        os.nice(niceness)
        self._cutter: Cutter | None = None

    def open(self, request: CutRequest) -> Answer:
        """Closes the video before and opens this one."""
        self.close()
        self._cutter = Cutter(request)
        return self._guard(self._cutter.open)

    def pull(self) -> Answer:
        """The next answer of the open video."""
        if self._cutter is None:
            return WorkerLost("pull without an open video", stage="decode")
        return self._guard(self._cutter.next)

    def close(self) -> None:
        """Releases the open video, if any."""
        if self._cutter is not None:
            self._cutter.close()
            self._cutter = None

    def _guard(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except LatheError as error:
            return error
        except MemoryError:
            return DamagedInput(
                "decoder_memory", "decoding needs more memory than decode.memory_bytes allows", stage="decode"
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours that this video brings out; the traceback travels along
            lost = WorkerLost(f"decoder failed with {type(error).__name__}: {error}", blame=True, stage="decode")
            lost.add_note(traceback.format_exc())
            return lost


def limit_address_space(extra_bytes: int) -> None:
    """Caps this process at its present address space plus `extra_bytes`, so that a decompression bomb dies alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + extra_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


class ProcessLanes:
    """Lanes as child processes of this one. A thread drains their pipes, so that a lane never waits for a busy owner."""

    def __init__(self, count: int, memory_bytes: int, niceness: int = 0) -> None:
        self.count = count
        self._memory_bytes = memory_bytes
        self._niceness = niceness
        # Each answer with the process it is of: `wait` drops those of a process that was replaced meanwhile.
        self._answers: queue.SimpleQueue[tuple[Connection, int, int, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        # Killed and replaced. Only the drain thread closes their pipes: it may be reading one, and the descriptor would be reused.
        self._retired: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._dying: list[subprocess.Popen[bytes]] = []  # retired, killed and not yet reaped
        # The drain thread sleeps in `wait`; a byte on this pipe makes it look at a changed set of lanes.
        self._alarm_out, self._alarm_in = Pipe(duplex=False)
        for _ in range(count):
            child, pipe = self._spawn()
            self._children.append(child)
            self._pipes.append(pipe)
        self._thread = threading.Thread(target=self._drain, name="lanes", daemon=True)
        self._thread.start()

    def open(self, lane: int, ticket: int, request: CutRequest) -> None:  # noqa: D102
        self._send(lane, ("open", ticket, request))

    def pull(self, lane: int, ticket: int) -> None:  # noqa: D102
        self._send(lane, ("pull", ticket, None))

    def wait(self, timeout_s: float) -> list[tuple[int, int, Answer]]:  # noqa: D102
        items = []
        try:
            items.append(self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait())
            while True:
                items.append(self._answers.get_nowait())
        except queue.Empty:
            pass
        answers = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            pipe, lane, ticket, answer = item
            if pipe is self._pipes[lane]:
                answers.append((lane, ticket, answer))
        return answers

    def receiving(self, lane: int) -> bool:
        """Never: `open` returns when the video is in the pipe."""
        return False

    def restart(self, lane: int) -> None:  # noqa: D102
        with self._lock:
            if self._closing:
                return
            child, pipe = self._children[lane], self._pipes[lane]
            self._children[lane], self._pipes[lane] = self._spawn()
            self._retired.append((child, pipe))
        child.kill()
        self._alarm_in.send_bytes(b"!")

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._closing = True
            children = [*self._children, *(child for child, _ in self._retired)]
        for child in children:
            child.kill()
        self._alarm_in.send_bytes(b"!")
        self._thread.join(JOIN_S)
        for child in [*children, *self._dying]:
            with contextlib.suppress(subprocess.TimeoutExpired):  # see `_drain_once`
                child.wait(REAP_S)
        # The pipes close with this object: another thread may still be sending on one, and ends by the broken pipe.

    def pids(self) -> list[int]:
        """Process ids, by lane."""
        return [child.pid for child in self._children]

    def _spawn(self) -> tuple[subprocess.Popen[bytes], Connection]:
        # A fresh interpreter rather than multiprocessing: nothing of the caller's main module is run again, no CUDA context,
        # no locks inherited from threads.
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        arguments = theirs.fileno(), self._memory_bytes, self._niceness, os.getpid()
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.engine.lanes", *map(str, arguments)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is the owner's decision, also before the child can say so
        )
        theirs.close()
        return child, ours

    def _send(self, lane: int, message: tuple[str, int, Any]) -> None:
        # A broken pipe needs no answer here: the drain thread sees the same end of file and reports WorkerLost for this lane.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipes[lane].send(message)

    def _drain(self) -> None:
        try:
            lost: set[Connection] = set()
            while not self._closing:
                self._drain_once(lost)
        except Exception as error:  # noqa: BLE001 - raised by `wait`: without this thread no answer would ever come
            self._answers.put(error)

    def _drain_once(self, lost: set[Connection]) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
            lanes = {pipe: lane for lane, pipe in enumerate(self._pipes) if pipe not in lost}
        for child, pipe in retired:
            lost.discard(pipe)
            pipe.close()
            self._dying.append(child)
        # Not waited for: a process that hangs in a read of a dead mount survives SIGKILL until the mount answers.
        self._dying = [child for child in self._dying if child.poll() is None]
        for ready in wait([*lanes, self._alarm_out]):
            if ready is self._alarm_out:
                self._alarm_out.recv_bytes()
                continue
            assert isinstance(ready, Connection)  # noqa: S101 - the alarm was handled above
            lane = lanes[ready]
            try:
                self._answers.put((ready, lane, *_receive(ready)))
            except Exception as error:  # noqa: BLE001 - the end of the process, or bytes of a decoder that went astray
                lost.add(ready)
                with self._lock:
                    current = self._children[lane] if self._pipes[lane] is ready else None
                if current is not None and not self._closing:
                    self._answers.put((ready, lane, -1, _end_of(current, error)))


def _end_of(child: subprocess.Popen[bytes], error: Exception) -> WorkerLost:
    """Why nothing more comes from `child`, whose pipe gave `error`."""
    if isinstance(error, EOFError | OSError):
        try:
            return lost_by(child.wait(REAP_S))
        except subprocess.TimeoutExpired:
            return WorkerLost("decoder process closed its pipe and went on", blame=True, stage="decode")
    message = f"decoder process sent an answer that cannot be read ({type(error).__name__}: {error})"
    return WorkerLost(message, blame=True, stage="decode")


def _transmit(pipe: Connection, ticket: int, answer: Answer) -> None:
    # Planes travel as raw bytes behind their header: one copy less on either side than pickling them.
    if isinstance(answer, FrameChunk):
        planes = answer.planes_T3HW
        pipe.send(
            (ticket, ("chunk", answer.clip, planes.shape, answer.pts_s, answer.color_matrix, answer.first, answer.last))
        )
        pipe.send_bytes(np.ascontiguousarray(planes).data.cast("B"))
    else:
        pipe.send((ticket, answer))


def _receive(pipe: Connection) -> tuple[int, Answer]:
    ticket, answer = pipe.recv()
    if isinstance(answer, tuple):
        _, clip, shape, pts_s, matrix, first, last = answer
        planes_T3HW = np.empty(shape, np.uint8)
        pipe.recv_bytes_into(planes_T3HW.data.cast("B"))
        answer = FrameChunk(clip, planes_T3HW, pts_s, matrix, first, last)
    return ticket, answer


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends (Linux), also while stuck inside a codec."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def niceness_beside(device: str) -> int:
    """Decoders give way to a CPU encoder, whose threads all wait when one is pushed aside; beside a GPU they have the cores to themselves.

    When frames run short the encoder sleeps, and a decoder then gets whole cores whatever its niceness.
    """
    return 10 if device == "cpu" else 0


def _serve(descriptor: int, memory_bytes: int, niceness: int, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's decision
    pipe = Connection(descriptor)
    worker = LaneWorker(memory_bytes, niceness)
    # OSError: the owner closed the pipe or died in the middle of a message. It needs no answer, and the user no traceback.
    with contextlib.suppress(EOFError, OSError):
        _transmit(pipe, -1, LaneReady())
        while True:
            verb, ticket, request = pipe.recv()
            _transmit(pipe, ticket, worker.open(request) if verb == "open" else worker.pull())


if __name__ == "__main__":
    # Under `-m` this file is `__main__`; the classes it sends must be those of `pipeline.engine.lanes`.
    from pipeline.engine import lanes

    lanes._serve(*map(int, sys.argv[1:]))

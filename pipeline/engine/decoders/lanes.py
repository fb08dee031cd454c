"""Decoder processes that may be killed: one video at a time each, one answer for each question.

Takes `CutRequest`s and pulls. Gives answers tagged with lane and ticket. A lane that dies is reported and replaced on request; the feed
drops answers of an earlier ticket. `Lanes` is the contract; `ProcessLanes` runs children of this process over pipes (no Ray);
`ray_lanes` has a second implementation on Ray actors. Both wrap the same `LaneWorker`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.engine.decoders.exit_status import lost_by
from pipeline.engine.decoders.lane_sender import LaneSender
from pipeline.errors import DamagedInput, LatheError, WorkerLost
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, VideoEnded
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import read_mark

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

START_S = 120.0  # for a process to be up: the interpreter and libav load from a slow disk, but not for ever
REAP_S = 5.0  # for a process whose pipe has ended to end too
JOIN_S = 5.0  # for the drain thread to end


@dataclass(frozen=True, slots=True)
class LaneReady:
    """The lane's process is up (again) and idle."""


Answer = LaneReady | OpenedVideo | FrameChunk | ClipFailed | VideoEnded | LatheError


class Lanes(Protocol):
    """A set of decoder processes. Calls return at once; answers come from `wait`, in order per lane."""

    count: int
    start_limit_s: float  # for a process to be up; inf where it may have to wait for a place to run

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

    def reading(self, lane: int) -> bool:
        """Whether the lane's process is inside a read of its video's file right now; False where that cannot be known."""
        ...

    def restart(self, lane: int) -> None:
        """Kills the lane's process, whatever it does, and starts another; `LaneReady` or `WorkerLost` follows."""
        ...

    def close(self) -> None:
        """Ends all processes, whatever they do; later calls do nothing. Other threads may still be inside the methods above."""
        ...


class LaneWorker:
    """What runs inside a decoder process, behind a pipe or a Ray actor: one open video, answers instead of exceptions."""

    def __init__(self, memory_bytes: int, niceness: int) -> None:
        limit_address_space(memory_bytes)
        os.nice(niceness)
        gc.freeze()  # what is loaded is not looked at again: a collection takes 0.1 ms, not 20
        self._cutter: Cutter | None = None

    def open(self, request: CutRequest) -> Answer:
        """Closes the video before and opens this one."""
        self.close()
        self._cutter = Cutter(request)
        answer = self._guard(self._cutter.open)
        if request.headers_only or isinstance(answer, LatheError):
            self._free()
        return answer

    def pull(self) -> Answer:
        """The next answer of the open video."""
        if self._cutter is None:
            return WorkerLost("pull without an open video", stage="decode")
        answer = self._guard(self._cutter.next)
        if isinstance(answer, VideoEnded | LatheError):
            self._free()
        return answer

    def close(self) -> None:
        """Releases the open video, if any."""
        if self._cutter is not None:
            self._cutter.close()
            self._cutter = None

    def _free(self) -> None:
        """Frees all that is left of the video before it is answered for: if that crashes, no other video must get the blame."""
        if self._cutter is not None:
            self._cutter.close()
        gc.collect()

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


@dataclass(frozen=True, slots=True)
class _Child:
    """A decoder process and what its owner holds of it."""

    process: subprocess.Popen[bytes]
    pipe: Connection  # read and closed by the drain thread alone
    sender: LaneSender
    mark: mmap.mmap  # see `read_mark`


class ProcessLanes:
    """Lanes as child processes of this one. A thread drains their pipes, so that a lane never waits for a busy owner."""

    def __init__(self, count: int, memory_bytes: int, niceness: int = 0) -> None:
        self.count = count
        self._memory_bytes = memory_bytes
        self._niceness = niceness
        self.start_limit_s = START_S
        # Each answer with the process it is of: `wait` drops those of a process that was replaced meanwhile.
        self._answers: queue.SimpleQueue[tuple[_Child | None, int, int, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        # Also where a signal interrupts the owner before it can close these lanes, and a process is not far enough to see its parent end.
        self._started: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _kill, self._started)
        self._children: list[_Child | None] = [None] * count  # None: the last start failed
        # Killed and replaced. Only the drain thread closes their pipes: it may be reading one, and the descriptor would be reused.
        self._retired: list[_Child] = []
        self._dying: list[subprocess.Popen[bytes]] = []  # retired, killed and not yet reaped
        # The drain thread sleeps in `wait`; a byte on this pipe makes it look at a changed set of lanes.
        self._alarm_out, self._alarm_in = Pipe(duplex=False)
        for lane in range(count):
            self._start(lane)
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
            child, lane, ticket, answer = item
            if child is self._children[lane]:
                answers.append((lane, ticket, answer))
        return answers

    def receiving(self, lane: int) -> bool:
        """Never: a process that takes no video within the time limit is as stuck as one that gives no answer."""
        return False

    def reading(self, lane: int) -> bool:  # noqa: D102
        child = self._children[lane]
        return child is not None and child.mark[0] != 0

    def restart(self, lane: int) -> None:  # noqa: D102
        with self._lock:
            if self._closing:
                return
            if (child := self._children[lane]) is not None:
                self._retired.append(child)
                child.process.kill()
                child.sender.end()
            self._start(lane)
        self._alarm_in.send_bytes(b"!")

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._closing = True
            children = [child for child in [*self._children, *self._retired] if child is not None]
        for child in children:
            child.process.kill()
            child.sender.end()
        self._alarm_in.send_bytes(b"!")
        self._thread.join(JOIN_S)
        for process in [*(child.process for child in children), *self._dying]:
            with contextlib.suppress(subprocess.TimeoutExpired):  # see `_drain_once`
                process.wait(REAP_S)
        # The pipes close with this object: the drain thread may still be reading one.

    def pids(self) -> list[int]:
        """Process ids of lanes that have a process, by lane."""
        return [child.process.pid for child in self._children if child is not None]

    def _start(self, lane: int) -> None:
        """A new process for the lane. One that cannot be started, for want of processes, descriptors or memory, is lost at once."""
        self._children[lane] = None
        try:
            self._children[lane] = self._spawn()
        except (OSError, RuntimeError) as error:  # RuntimeError: no further thread
            text = f"decoder process cannot be started: {getattr(error, 'strerror', None) or error}"
            self._answers.put((None, lane, -1, WorkerLost(text, stage="decode")))

    def _spawn(self) -> _Child:
        # A fresh interpreter rather than multiprocessing: nothing of the caller's main module is run again, no CUDA context,
        # no locks inherited from threads.
        with contextlib.ExitStack() as undo, tempfile.TemporaryFile(prefix="lathe-") as shared:
            read_mark.prepare(shared.fileno())
            mark = read_mark.look(shared.fileno())
            ours, theirs = Pipe()
            undo.callback(ours.close)
            with theirs:
                sender = LaneSender(ours, self._answers.put)
                undo.callback(sender.end)
                process = self._popen(theirs.fileno(), shared.fileno())
                self._started[:] = [other for other in self._started if other.poll() is None] + [process]
            undo.pop_all()
        return _Child(process, ours, sender, mark)

    def _popen(self, pipe: int, shared: int) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        arguments = pipe, self._memory_bytes, self._niceness, os.getpid(), shared
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.engine.decoders.lanes", *map(str, arguments)],
            pass_fds=[pipe, shared],
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is the owner's decision, also before the child can say so
        )

    def _send(self, lane: int, message: tuple[str, int, Any]) -> None:
        child = self._children[lane]
        if child is not None:  # else its `WorkerLost` is on its way
            child.sender.send(message)

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
            children = {child.pipe: (lane, child) for lane, child in enumerate(self._children) if child is not None}
        for child in retired:
            lost.discard(child.pipe)
            child.pipe.close()
            self._dying.append(child.process)
        # Not waited for: a process that hangs in a read of a dead mount survives SIGKILL until the mount answers.
        self._dying = [process for process in self._dying if process.poll() is None]
        for ready in wait([*(pipe for pipe in children if pipe not in lost), self._alarm_out]):
            if ready is self._alarm_out:
                self._alarm_out.recv_bytes()
                continue
            assert isinstance(ready, Connection)  # noqa: S101 - the alarm was handled above
            lane, child = children[ready]
            try:
                self._answers.put((child, lane, *_receive(ready)))
            except Exception as error:  # noqa: BLE001 - the end of the process, or bytes of a decoder that went astray
                lost.add(ready)
                if self._children[lane] is child and not self._closing:
                    self._answers.put((child, lane, -1, _end_of(child.process, error)))


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()


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
        flags = answer.first, answer.last, answer.damaged
        pipe.send((ticket, ("chunk", answer.clip, planes.shape, answer.pts_s, answer.color_matrix, *flags)))
        pipe.send_bytes(np.ascontiguousarray(planes).data.cast("B"))
    else:
        pipe.send((ticket, answer))


def _receive(pipe: Connection) -> tuple[int, Answer]:
    ticket, answer = pipe.recv()
    if isinstance(answer, tuple):
        _, clip, shape, pts_s, matrix, *flags = answer
        planes_T3HW = np.empty(shape, np.uint8)
        pipe.recv_bytes_into(planes_T3HW.data.cast("B"))
        answer = FrameChunk(clip, planes_T3HW, pts_s, matrix, *flags)
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


def _serve(descriptor: int, memory_bytes: int, niceness: int, parent_pid: int, shared: int) -> None:
    die_with_parent(parent_pid)
    read_mark.share(shared)
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
    # Under `-m` this file is `__main__`; the classes it sends must be those of `pipeline.engine.decoders.lanes`.
    from pipeline.engine.decoders import lanes

    lanes._serve(*map(int, sys.argv[1:]))

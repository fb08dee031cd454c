"""`Lanes` as child processes of this one, over pipes. One thread reads all pipes, so that a decoder never waits for a busy owner."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.engine.decoders.exit_status import lost_by
from pipeline.engine.decoders.lane_sender import LaneSender
from pipeline.engine.decoders.lane_wire import receive
from pipeline.errors import WorkerLost
from pipeline.video.decode import read_mark

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from pipeline.engine.decoders.lanes import Answer
    from pipeline.video.cutting import CutRequest

START_S = 120.0  # for a process to be up: the interpreter and libav may load from a slow disk
REAP_S = 5.0  # for a process whose pipe has ended to end too
JOIN_S = 5.0  # for the drain thread to end


@dataclass(frozen=True, slots=True)
class _Child:
    """A decoder process with its pipe, the thread that sends to it, and its read mark."""

    process: subprocess.Popen[bytes]
    pipe: Connection  # read and closed by the drain thread alone
    sender: LaneSender
    mark: mmap.mmap  # see `read_mark`


class ProcessLanes:
    """See the module. `memory_bytes` limits each process, above what it uses after its start."""

    def __init__(self, count: int, memory_bytes: int, niceness: int = 0) -> None:
        self.count = count
        self._memory_bytes = memory_bytes
        self._niceness = niceness
        self.start_limit_s = START_S
        # Each answer with its process: `wait` drops answers of a process that was replaced meanwhile.
        self._answers: queue.SimpleQueue[tuple[_Child | None, int, int, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        # For a signal that interrupts the owner before it can close these lanes: a starting process does not notice its parent's end.
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
        """Always False: a process that does not read its video within the time limit hangs like one that does not answer."""
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
        """Starts a process for the lane. Where the machine has no processes, descriptors or memory left, the lane is lost at once."""
        self._children[lane] = None
        try:
            self._children[lane] = self._spawn()
        except (OSError, RuntimeError) as error:  # RuntimeError: no further thread
            text = f"decoder process cannot be started: {getattr(error, 'strerror', None) or error}"
            self._answers.put((None, lane, -1, WorkerLost(text, stage="decode")))

    def _spawn(self) -> _Child:
        # A fresh interpreter rather than multiprocessing (ADR 3): the caller's main module is not run again, and no CUDA context and no
        # locks of threads are inherited.
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
        arguments = pipe, self._memory_bytes, self._niceness, os.getpid(), shared
        environment = {"CUDA_VISIBLE_DEVICES": ""}
        return start_program("pipeline.engine.decoders.lane_process", arguments, (pipe, shared), environment)

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
                self._answers.put((child, lane, *receive(ready)))
            except Exception as error:  # noqa: BLE001 - the end of the process, or bytes of a decoder that went astray
                lost.add(ready)
                if self._children[lane] is child and not self._closing:
                    self._answers.put((child, lane, -1, _end_of(child.process, error)))


def start_program(
    module: str, arguments: Sequence[int], descriptors: Sequence[int], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a decoder process in a fresh interpreter, which inherits `descriptors`. `environment`: over this process's."""
    root = str(Path(pipeline.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        pass_fds=list(descriptors),
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C reaches the owner only, also before the child ignores it
    )


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()


def _end_of(child: subprocess.Popen[bytes], error: Exception) -> WorkerLost:
    """Why `child`, whose pipe raised `error`, sends no further answer."""
    if isinstance(error, EOFError | OSError):
        try:
            return lost_by(child.wait(REAP_S))
        except subprocess.TimeoutExpired:
            return WorkerLost("decoder process closed its pipe and went on", blame=True, stage="decode")
    message = f"decoder process sent an answer that cannot be read ({type(error).__name__}: {error})"
    return WorkerLost(message, blame=True, stage="decode")

"""Decoder processes of `ProcessLanes` forked from a process that has imported everything, instead of importing for 0.4 s of CPU each.

`install` replaces `ProcessLanes._popen` in this process. What it starts is a process like the one it replaces: a child of this process
with its own pipe, memory limit, process group and pid, which may be sent any signal and dies with this process. Its parent would be the
process that forks; it is orphaned at once and, while the request lasts, this process is the one that adopts orphans (a subreaper).

A decoder gets a fresh interpreter where starting is the claim: in the context of `fresh`, and wherever PYTHONPATH is not the suite's own,
as in tests that give decoders a `sitecustomize`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.decoders import lane_process
from pipeline.engine.decoders.process_lanes import ProcessLanes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
ADOPTED_S = 60.0  # for an orphan to be given to its new parent
PR_SET_CHILD_SUBREAPER = 36
_fresh_popen = ProcessLanes._popen


def install() -> None:
    """Decoders of this process are forked by a process that the first one starts."""
    _install(_started_server)


def install_forked() -> None:
    """The same in a process that has just been forked and has no threads: a copy of it is the process that forks decoders."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # for the command; this process ends after it
            signal.signal(number, signal.SIG_IGN)
        _serve(theirs)
    theirs.close()
    server = _Server(ours)
    _install(lambda: server)


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Decoders of this process are fresh interpreters in this context."""
    forked, ProcessLanes._popen = ProcessLanes._popen, _fresh_popen  # type: ignore[method-assign]
    try:
        yield
    finally:
        ProcessLanes._popen = forked  # type: ignore[method-assign]


def _install(server: Any) -> None:
    path = os.environ.get("PYTHONPATH")

    def popen(lanes: ProcessLanes, pipe: int, shared: int) -> subprocess.Popen[bytes]:
        if os.environ.get("PYTHONPATH") != path:
            return _fresh_popen(lanes, pipe, shared)
        return server().start(pipe, shared, lanes._memory_bytes, lanes._niceness)

    ProcessLanes._popen = popen  # type: ignore[method-assign]


class _Decoder(subprocess.Popen[bytes]):
    """A child of this process that `subprocess` did not start."""

    def __init__(self, pid: int) -> None:
        self.args = ["decoder"]
        self.pid = pid
        self.returncode = None
        self.stdin = self.stdout = self.stderr = None
        self._child_created = True
        self._sigint_wait_secs = 0.25
        self._waitpid_lock = threading.Lock()


class _Server:
    """Asks the process that forks."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._lock = threading.Lock()

    def start(self, pipe: int, shared: int, memory_bytes: int, niceness: int) -> _Decoder:
        answers, theirs = socket.socketpair()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        request = {"limits": [memory_bytes, niceness], "owner": os.getpid(), "environment": environment}
        text = json.dumps({**request, "cwd": os.getcwd()}).encode()
        with answers, self._lock:
            _adopt_orphans(True)
            try:
                with theirs:
                    descriptors = [pipe, shared, 1, 2, theirs.fileno()]
                    socket.send_fds(self._requests, [len(text).to_bytes(4, "big")], descriptors)
                    self._requests.sendall(text)
                pid = answers.recv(20)
            finally:
                _adopt_orphans(False)
        if not pid:
            raise OSError("the process that forks decoders has died")
        return _Decoder(int(pid))


def _adopt_orphans(adopts: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0)


@functools.cache
def _started_server() -> _Server:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_decoders", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )

    def close() -> None:
        ours.close()
        process.wait(10)

    atexit.register(close)
    return _Server(ours)


# ---- in the process that forks ----


def _serve(requests: socket.socket) -> None:
    """Never returns. Ends when the requesting process is gone."""
    while True:
        size, descriptors, _, _ = socket.recv_fds(requests, 4, 5)
        if not size:
            os._exit(0)
        text = b""
        while len(text) < int.from_bytes(size, "big"):
            text += requests.recv(65536)
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                requests.close()
                _decode(json.loads(text), *descriptors)
            os._exit(0)
        os.waitpid(middle, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _decode(request: dict[str, Any], pipe: int, shared: int, stdout: int, stderr: int, answers: int) -> None:
    """What `python -m pipeline.engine.decoders.lane_process` does, and never returns."""
    code = 1
    try:
        deadline = time.monotonic() + ADOPTED_S
        while os.getppid() != request["owner"]:
            if time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.0005)
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # asks the environment again
        with socket.socket(fileno=answers) as answering:
            answering.sendall(str(os.getpid()).encode())
        for descriptor in (stdout, stderr):
            os.close(descriptor)
        lane_process.serve(pipe, *request["limits"], request["owner"], shared)
        code = 0
    except BaseException:  # noqa: BLE001 - a fresh interpreter would print it and end so
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

"""`lathe` commands in processes of their own that do not import for seconds: each is forked from a process that has imported everything.

`start` and `run` take the arguments of a command and answer like `subprocess.Popen` and `subprocess.run`. The child is a real process:
it has its own environment, folder, standard streams and exit status, may be sent any signal, and runs `pipeline.cli.main` to the end of
its interpreter. Use a fresh interpreter (`sys.executable -m pipeline`) where starting is the claim.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from tests import forked_decoders

ROOT = Path(__file__).resolve().parents[1]
RUN_LIMIT_S = 300.0
SUITE_PATH = os.environ.get("PYTHONPATH")  # a test that gives another one gives it to decoders, which must then import


def run(*arguments: Any, timeout: float = RUN_LIMIT_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command's exit status and what it printed. `options` are those of `start`."""
    command = start(*arguments, **options)
    try:
        stdout, stderr = command.communicate(timeout)
    except BaseException:
        command.kill()
        raise
    return subprocess.CompletedProcess(command.args, command.wait(), stdout, stderr)


def start(*arguments: Any, **options: Any) -> ForkedCommand:
    """A running command.

    `options`: `env`, `cwd`, file descriptors `stdin`, `stdout`, `stderr` instead of pipes, `fresh_decoders` (decoders are then found
    in /proc by their arguments and environment), and `prepare`, "module:function", called in the new process before the command.
    """
    return _server().start([str(argument) for argument in arguments], **options)


class ForkedCommand:
    """Subset of `subprocess.Popen` with text streams, for a process that is not a child of this one."""

    def __init__(self, args: list[str], status: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.args, self.stdout, self.stderr = args, stdout, stderr
        self.returncode: int | None = None
        self._socket, self._status = status, status.makefile("r")
        self._ready = select.poll()
        self._ready.register(status, select.POLLIN)
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        """The exit status if the process has ended; minus the signal that killed it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when the process has ended."""
        if self.returncode is None:
            if not self._ready.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._answer()))
            self._status.close()
            self._socket.close()
        return self.returncode

    def _answer(self) -> str:
        answer = self._status.readline()
        assert answer, "the process that forks commands has died; what it wrote to stderr says why"
        return answer

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of both streams, when the process has ended."""
        found = ["", ""]

        def read(place: int, stream: IO[str]) -> None:
            with stream:
                found[place] = stream.read()

        streams = [(place, stream) for place, stream in enumerate((self.stdout, self.stderr)) if stream is not None]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended. Its number is not given to another process before `poll` has seen the end."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Server:
    """The process that forks, one for this process, and the socket that requests go over."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_command", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        atexit.register(self.close)

    def start(
        self,
        arguments: list[str],
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        fresh_decoders: bool = False,
        prepare: str = "",
    ) -> ForkedCommand:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ if env is None else env)
        request = json.dumps(
            {
                "arguments": arguments,
                "environment": environment,
                "cwd": str(cwd or os.getcwd()),
                "prepare": prepare,
                "fresh_decoders": fresh_decoders or environment.get("PYTHONPATH") != SUITE_PATH,
            }
        ).encode()
        with contextlib.ExitStack() as given:
            given.enter_context(theirs)
            streams: list[IO[str] | None] = []
            descriptors = [stdin if stdin is not None else os.open(os.devnull, os.O_RDONLY)]
            if stdin is None:
                given.callback(os.close, descriptors[0])
            for wanted in (stdout, stderr):
                if wanted is None:
                    reading, writing = os.pipe()
                    given.callback(os.close, writing)
                    streams.append(open(reading))  # noqa: SIM115 - the caller reads it
                else:
                    writing = wanted
                    streams.append(None)
                descriptors.append(writing)
            with self._lock:
                socket.send_fds(self._socket, [len(request).to_bytes(4, "big")], [*descriptors, theirs.fileno()])
                self._socket.sendall(request)
        return ForkedCommand(["lathe", *arguments], ours, streams[0], streams[1])

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


@functools.cache
def _server() -> _Server:
    return _Server()


# ---- in the process that forks ----


def _serve(requests: socket.socket) -> None:
    """Returns in each child, ready to run its command; ends the process when the requesting process is gone."""
    running: dict[int, socket.socket] = {}
    wake_out, wake_in = os.pipe()
    os.set_blocking(wake_in, False)
    signal.set_wakeup_fd(wake_in)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the requesting process
    while True:
        ready, _, _ = select.select([requests, wake_out], [], [])
        if wake_out in ready:
            os.read(wake_out, 512)
            _report_ended(running)
        if requests in ready:
            size, descriptors, _, _ = socket.recv_fds(requests, 4, 4)
            if not size:
                os._exit(0)
            request = json.loads(_exactly(requests, int.from_bytes(size, "big")))
            pid = os.fork()
            if pid == 0:
                for status in running.values():
                    status.close()
                for descriptor in (requests.detach(), wake_out, wake_in, descriptors[3]):
                    os.close(descriptor)
                _become(request, descriptors[:3])
                return
            running[pid] = socket.socket(fileno=descriptors[3])
            running[pid].sendall(f"{pid}\n".encode())
            for descriptor in descriptors[:3]:
                os.close(descriptor)


def _exactly(requests: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += requests.recv(size - len(found))
    return found


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as asker, contextlib.suppress(OSError):  # who asked may be gone
            asker.sendall(f"{status}\n".encode())


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Gives this process what a fresh interpreter would have: streams, folder, environment, signals, arguments."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # asks the environment again
    sys.argv = ["lathe", *request["arguments"]]
    sys.path[0] = request["cwd"]
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _stream(1)
    sys.stderr = sys.__stderr__ = _stream(2, line_buffering=True, errors="backslashreplace")
    if not request["fresh_decoders"]:
        forked_decoders.install_forked()
    if request["prepare"]:
        module, _, function = request["prepare"].partition(":")
        getattr(importlib.import_module(module), function)()


def _stream(number: int, *, line_buffering: bool = False, errors: str | None = None) -> Any:
    stream = open(number, "w", closefd=False, errors=errors)  # noqa: SIM115
    stream.reconfigure(line_buffering=line_buffering or os.isatty(number))
    return stream


def import_everything() -> None:
    from pipeline.encoder.network import load_torch

    load_torch()
    import pandas  # noqa: F401 - pyarrow imports it at its first conversion, in a second
    import pyarrow.parquet  # noqa: F401

    import model.leanvae.vae  # of the tiny network
    import model.out_of_memory
    import model.weights  # noqa: F401
    import pipeline.cli.app
    import pipeline.engine.driver.build
    import pipeline.engine.driver.encode
    import pipeline.engine.worker.pool
    import pipeline.operate.status
    import pipeline.operate.verify
    import pipeline.storage.s3  # noqa: F401

    threads = {
        int(task): Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")
    }
    del threads[os.getpid()]
    # A fork takes no threads along, so there must be none that anybody waits for. jemalloc (of pyarrow) starts its own again.
    assert set(threads.values()) <= {"jemalloc_bg_thd"}, f"not safe to fork beside {threads}"


if __name__ == "__main__":
    import_everything()
    gc.collect()
    gc.freeze()  # collections of a command, the last one among them, leave out what was imported here
    _serve(socket.socket(fileno=int(sys.argv[1])))
    from pipeline.cli import main

    __package__ = None  # what usage lines name the program after
    main()

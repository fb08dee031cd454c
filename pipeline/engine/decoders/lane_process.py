"""Program of one decoder process, started by `ProcessLanes`: `python -m …lane_process PIPE MEMORY NICENESS PARENT MARK`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from pipeline.engine.decoders.lane_wire import send
from pipeline.engine.decoders.lane_worker import LaneWorker
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.errors import WorkerLost
from pipeline.video.decode import read_mark

if TYPE_CHECKING:
    from collections.abc import Callable


def die_with_parent(parent_pid: int) -> None:
    """Lets the kernel send SIGKILL to this process when its parent ends (Linux), also while it hangs in a codec."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def serve(
    descriptor: int,
    memory_bytes: int,
    niceness: int,
    parent_pid: int,
    shared: int,
    *,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Answers requests until the pipe closes. `descriptor` is the pipe's, `shared` the one of the `read_mark`.

    `prepare` runs first, before memory is limited. If it raises `WorkerLost`, that is the only answer.
    """
    die_with_parent(parent_pid)
    read_mark.share(shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's decision
    pipe = Connection(descriptor)
    try:
        prepare()
    except WorkerLost as error:
        with contextlib.suppress(EOFError, OSError):
            send(pipe, -1, error)
            pipe.recv()  # until the owner kills this process: its exit code would be a second loss, without the reason
        return
    worker = LaneWorker(memory_bytes, niceness)
    # OSError: the owner closed the pipe or died in the middle of a message. It needs no answer, and the user no traceback.
    with contextlib.suppress(EOFError, OSError):
        send(pipe, -1, LaneReady())
        while True:
            verb, ticket, request = pipe.recv()
            send(pipe, ticket, worker.open(request) if verb == "open" else worker.pull())


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))

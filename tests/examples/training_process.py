"""Training runs of `examples.train_dit` in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.context import ForkServerProcess
from typing import Any

from torch import distributed

from examples.train_dit import Options, Trainer, train
from tests.threads import one_thread

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", __name__])
LIMIT_S = 300.0


def start(options: Options, rank: int = 0, world: int = 1, port: int = 0, target: Any = None) -> ForkServerProcess:
    """A running process of a group of `world`."""
    process = PROCESSES.Process(target=target or _run, args=(options, rank, world, port), daemon=True)
    process.start()
    return process


def start_endless(options: Options) -> ForkServerProcess:
    """A running process that waits before the log of its last step until it is killed."""
    return start(options, target=_run_endless)


def run(options: Options, world: int = 1) -> None:
    """Runs a group to its end."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = [start(options, rank, world, store.port) for rank in range(world)]
    for process in group:
        process.join(LIMIT_S)
    assert [process.exitcode for process in group] == [0] * world


def _run_endless(options: Options, *group: int) -> None:
    log = Trainer._log

    def waiting(self: Trainer, *line: Any) -> None:
        if self.step == options.steps:
            threading.Event().wait()
        log(self, *line)

    Trainer._log = waiting  # type: ignore[method-assign]
    _run(options, *group)


def _run(options: Options, rank: int, world: int, port: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in (address | ranks).items()})
    with one_thread():
        train(options)

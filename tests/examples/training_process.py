"""Training runs of `examples.train_dit` in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerProcess

from torch import distributed

from examples.train_dit import Options, train
from tests.threads import one_thread

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", __name__])
LIMIT_S = 300.0


def start(options: Options, rank: int = 0, world: int = 1, port: int = 0) -> ForkServerProcess:
    """A running process of a group of `world`."""
    process = PROCESSES.Process(target=_run, args=(options, rank, world, port), daemon=True)
    process.start()
    return process


def run(options: Options, world: int = 1) -> None:
    """Runs a group to its end."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = [start(options, rank, world, store.port) for rank in range(world)]
    for process in group:
        process.join(LIMIT_S)
    assert [process.exitcode for process in group] == [0] * world


def _run(options: Options, rank: int, world: int, port: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in (address | ranks).items()})
    with one_thread():
        train(options)

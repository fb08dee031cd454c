"""Encoder as a Ray actor, around an encode loop. Takes a context and shards, gives shard outcomes.

Ray neither restarts nor retries the actor: the driver decides that, with a reason. Decoder actors (`lanes`) belong to their encoder and end
with it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from pipeline.engine.decoders.lanes import niceness_beside
from pipeline.engine.nvdec.lanes import NvdecLanes
from pipeline.engine.ray.lanes import RayLanes
from pipeline.engine.ray.metrics import Meters, worker_values
from pipeline.engine.worker.death_record import DeathRecord
from pipeline.engine.worker.encode_loop import EncodeLoop, ShardFailure
from pipeline.engine.worker.load_progress import LoadProgress
from pipeline.engine.worker.pool import make_encoder
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.errors import LatheError, WorkerLost
from pipeline.process import kill_points as drill

if TYPE_CHECKING:
    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.shard_result import ShardResult
    from pipeline.records import Shard

DECODER_PLACEMENT_S = 300.0  # a cluster that grows may need minutes
SHARDS_AT_ONCE = 16  # threads for run_shard: `engine.credit` calls at a time, and repeated calls
CONTROL_CALLS = 8  # a repeated `load` waits for the first, and must not keep `stats` and `shutdown` waiting
OUTCOMES_KEPT = 64  # for repeated calls of `run_shard`
SHUTDOWN_S = 4.0  # for the step in flight to end


@dataclass(frozen=True, slots=True)
class Place:
    """Where an encoder runs: node id, host name, ids of its GPUs, and its `DeathRecord` there."""

    node: str
    host: str
    gpus: tuple[str, ...]
    record: str


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"shards": SHARDS_AT_ONCE, "control": CONTROL_CALLS})
class EncoderActor:
    """One encoder, pinned to its device. `run_shard` calls overlap; one thread drives the loop they share."""

    def __init__(self, context: BuildContext, decoders: int, threads: int | None) -> None:
        self._context = context
        self._decoders = decoders
        self._threads = threads
        self._loop: EncodeLoop | None = None
        self._record = DeathRecord()
        self._load_progress: LoadProgress | None = None
        self._arrived = threading.Condition()
        self._tickets: dict[str, int] = {}  # shard id -> the assignment it runs for
        self._outcomes: dict[int, ShardResult | ShardFailure] = {}  # by ticket, the last few
        self._broken: BaseException | None = None
        self._loading = threading.Lock()
        self._recording = threading.Lock()
        self._meters = Meters("encoder")
        self._loaded: dict[str, Any] | Exception | None = None
        self._stopping = threading.Event()
        self._driving: threading.Thread | None = None

    @ray.method(concurrency_group="control")
    def where(self) -> Place:
        """The node it runs on."""
        context = ray.get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", ())))
        return Place(str(context.get_node_id()), socket.gethostname(), gpus, self._record.path)

    @ray.method(concurrency_group="control")
    def load(self) -> dict[str, Any]:
        """Loads the network and starts the decoders. A repeated call (the connection was lost) returns the first answer."""
        with self._loading:
            if self._loaded is None:
                try:
                    self._loaded = self._load()
                except Exception as error:  # noqa: BLE001 - raised below, and to those who ask again
                    self._loaded = error
            if isinstance(self._loaded, Exception):
                raise self._loaded
            return self._loaded

    def _load(self) -> dict[str, Any]:
        job = self._context.job
        self._load_progress = LoadProgress()
        self._record.stage("starting decoders")
        if self._context.device == "cpu":
            keep_freed_memory()
        niceness, cpus = niceness_beside(self._context.device), job.engine.decoder_cpus
        lanes: RayLanes | NvdecLanes
        if job.decode.device == "cuda":  # children of this process: on its node, and on its GPU, the only one it sees
            lanes = NvdecLanes(self._decoders, job.decode.memory_bytes, "cuda")
        else:
            lanes = RayLanes(self._decoders, job.decode.memory_bytes, niceness, cpus, job.storage)
        self._record.stage("loading the network")
        drill.fire(job.drill, "in_load")
        encoder = make_encoder(self._context, self._threads)
        self._loop = EncodeLoop(self._context, encoder, lanes, self._record)
        self._record.stage("waiting for a decoder")
        self._await_decoder()
        self._record.stage("waiting for frames")
        self._load_progress = None
        self._driving = threading.Thread(target=self._drive, name="encode-loop", daemon=True)
        self._driving.start()
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def _await_decoder(self) -> None:
        deadline = time.monotonic() + DECODER_PLACEMENT_S
        while self._loop is not None and not self._loop.can_decode:
            if time.monotonic() > deadline:
                asked = self._context.job.engine.decoder_cpus
                raise WorkerLost(  # of this encoder only: those on other nodes may have decoders
                    f"no decoder actor could be placed in {DECODER_PLACEMENT_S:.0f} s: each needs {asked:g} CPU, free are "
                    f"{ray.available_resources().get('CPU', 0):g}; add CPUs or lower engine.decoder_cpus"
                )
            time.sleep(0.02)

    @ray.method(concurrency_group="shards")
    def run_shard(self, shard: Shard, blamed: tuple[BlamedVideo, ...], ticket: int) -> ShardResult | ShardFailure:
        """One attempt, from fetch to receipt. `blamed`: its videos that ended workers.

        A call repeated with its `ticket` (the connection was lost) returns the same outcome.
        """
        if self._loop is None:
            raise RuntimeError("load() first")
        shard_id = shard.id(self._context.fingerprint)
        with self._arrived:
            new = ticket not in self._outcomes and self._tickets.get(shard_id) != ticket
            if new:
                self._tickets[shard_id] = ticket
        if new:
            self._loop.submit(shard, blamed)
        with self._arrived:
            self._arrived.wait_for(lambda: ticket in self._outcomes or self._broken is not None)
            if ticket not in self._outcomes and self._broken is not None:
                raise self._broken
            return portable(self._outcomes[ticket])

    @ray.method(concurrency_group="control")
    def hand_back(self, shard_ids: list[str]) -> None:
        """Ends these attempts: their `run_shard` returns a failure, `HandedBack`."""
        if self._loop is not None:
            self._loop.hand_back(shard_ids)

    @ray.method(concurrency_group="control")
    def shutdown(self) -> None:
        """Ends the loop, its attempts with their temporary files, and the decoders. The driver then kills the process."""
        self._stopping.set()
        if self._driving is not None:
            self._driving.join(SHUTDOWN_S)
        if self._loop is not None and (self._driving is None or not self._driving.is_alive()):
            self._loop.close()
        self._record.close()

    @ray.method(concurrency_group="control")
    def stats(self) -> WorkerStats:
        """Live numbers, which are exported as well; before `load` has returned only its progress."""
        self._record.refresh()
        load, loop = self._load_progress, self._loop
        if load is not None:
            return WorkerStats(progress=load.value)
        if loop is None:
            return WorkerStats()
        stats = loop.live_stats()
        with self._recording:
            self._meters.record(worker_values(stats))
        return stats

    def _drive(self) -> None:
        loop = self._loop
        if loop is None:
            raise RuntimeError("load() first")
        try:
            while not self._stopping.is_set():
                outcomes = loop.step()
                if outcomes:
                    with self._arrived:
                        self._keep(outcomes)
                        self._arrived.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised by every waiting run_shard
            with self._arrived:
                self._broken = error
                self._arrived.notify_all()

    def _keep(self, outcomes: list[ShardResult | ShardFailure]) -> None:
        for outcome in outcomes:
            self._outcomes[self._tickets.pop(outcome.shard_id)] = outcome
        while len(self._outcomes) > OUTCOMES_KEPT:
            del self._outcomes[next(iter(self._outcomes))]


def keep_freed_memory() -> None:
    """Tells glibc to keep memory that an encode step frees, in one arena; does nothing on other systems.

    The loop does not run in the main thread, and arenas of other threads return every large block to the kernel at once. Measured: a step
    then takes half a million page faults instead of a hundred thousand, 5-10 % of its time and 140 MB more.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(arena_max, 1)


def portable(outcome: ShardResult | ShardFailure) -> ShardResult | ShardFailure:
    """The outcome with an error that can be pickled: exceptions of other libraries may not."""
    if not isinstance(outcome, ShardFailure) or isinstance(outcome.error, LatheError):
        return outcome
    error = LatheError(f"{type(outcome.error).__name__}: {outcome.error}")
    error.add_note("".join(traceback.format_exception(outcome.error)))
    return ShardFailure(outcome.shard_id, error)

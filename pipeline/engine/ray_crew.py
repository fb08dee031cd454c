"""Encoders as Ray actors, seen from the driver: creates, feeds, watches and replaces them.

Enters: assignments. Leaves: crew events. What to do about a failure is the dispatcher's business; this room only says what happened.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.engine import ray_session
from pipeline.engine.crew import CrewEvent, Notice, Pulse, ShardEnded, WorkerGone, WorkerUp, decoders_per_encoder
from pipeline.engine.ray_actors import EncoderActor
from pipeline.errors import BuildError, FatalError, WorkerLost

if TYPE_CHECKING:
    from pipeline.engine.blueprint import Blueprint
    from pipeline.engine.ray_session import Cluster
    from pipeline.records import Shard

PULSE_S = 2.0
PLACEMENT_S = 30.0  # before a person is told that encoders wait for resources
LOAD_FAILURES = 3  # encoders in a row that do not come up before the build stops


@dataclass(slots=True)
class _Worker:
    name: str
    actor: Any
    loading: Any  # ref of load(), None once up
    shards: dict[Any, str] = field(default_factory=dict)  # ref -> shard id
    pulse: Any = None  # ref of stats(), if one is on its way
    pulse_asked: float = 0.0
    alive_at: float = 0.0  # last sign of progress, this process's clock
    created_at: float = field(default_factory=time.monotonic)
    progress_mark: float = 0.0  # the worker's own clock at its last progress


class RayCrew:
    """See the module."""

    def __init__(self, blueprint: Blueprint, cluster: Cluster) -> None:
        self._blueprint = blueprint
        self._cluster = cluster
        self._workers: dict[str, _Worker] = {}
        self._created = 0
        self._wanted = 0
        self._load_failures = 0
        self._told_waiting = False
        self.size = encoders_for(blueprint, cluster)
        engine = blueprint.job.engine
        cores = (os.cpu_count() or 1) if cluster.local else cluster.cpus
        spare = cores if cluster.local else cores - self.size * engine.encoder_cpus
        self._decoders = engine.decoders or decoders_per_encoder(None, int(spare / engine.decoder_cpus), self.size)
        self._threads = engine.threads or max(1, int(cores // max(self.size, cluster.nodes)))

    def start(self, wanted: int) -> None:  # noqa: D102
        self._wanted = min(wanted, self.size)
        while len(self._workers) < self._wanted:
            self._create()

    def assign(self, worker: str, shard: Shard) -> None:  # noqa: D102
        record = self._workers[worker]
        if not record.shards:
            record.alive_at = time.monotonic()
        record.shards[record.actor.run_shard.remote(shard)] = shard.id(self._blueprint.fingerprint)

    def poll(self, timeout_s: float) -> list[CrewEvent]:  # noqa: D102
        self._ask_pulses()
        owners = {ref: worker for worker in self._workers.values() for ref in self._refs(worker)}
        if not owners:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        events: list[CrewEvent] = []
        for ref in ready:
            worker = owners[ref]
            if worker.name in self._workers:
                events += self._settle(worker, ref)
        events += self._hung()
        events += self._waiting()
        self.start(self._wanted)
        return events

    def close(self) -> None:  # noqa: D102
        for worker in self._workers.values():
            ray.kill(worker.actor, no_restart=True)
        self._workers.clear()
        ray_session.disconnect()

    def _create(self) -> None:
        self._created += 1
        engine = self._blueprint.job.engine
        options = {
            "num_cpus": engine.encoder_cpus,
            "num_gpus": 1 if self._blueprint.device.startswith("cuda") else 0,
            "name": None,
        }
        actor = EncoderActor.options(**options).remote(self._blueprint, self._decoders, self._threads)  # type: ignore[attr-defined]
        name = f"encoder-{self._created}"
        self._workers[name] = _Worker(name, actor, actor.load.remote())

    @staticmethod
    def _refs(worker: _Worker) -> list[Any]:
        return [ref for ref in (worker.loading, worker.pulse, *worker.shards) if ref is not None]

    def _settle(self, worker: _Worker, ref: Any) -> list[CrewEvent]:
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, FatalError):
                raise cause from error
            return self._gone(worker, cause)
        except RayError as error:
            return self._gone(worker, error)
        if ref == worker.loading:
            worker.loading = None
            worker.alive_at = time.monotonic()
            self._load_failures = 0
            return [WorkerUp(worker.name)]
        if ref == worker.pulse:
            worker.pulse = None
            if value.get("last_progress", 0.0) != worker.progress_mark:
                worker.progress_mark, worker.alive_at = value["last_progress"], time.monotonic()
            return [Pulse(worker.name, value)]
        del worker.shards[ref]
        worker.alive_at = time.monotonic()
        return [ShardEnded(worker.name, value)]

    def _gone(self, worker: _Worker, error: Exception) -> list[CrewEvent]:
        del self._workers[worker.name]
        ray.kill(worker.actor, no_restart=True)
        if worker.loading is not None:
            self._load_failures += 1
            if self._load_failures >= LOAD_FAILURES:
                raise BuildError(f"{LOAD_FAILURES} encoders in a row did not come up; last: {error}") from error
        preempted = isinstance(error, RayActorError) and bool(getattr(error, "preempted", False))
        lost = WorkerLost(f"{worker.name} lost: {' '.join(str(error).split())[:300]}")
        return [WorkerGone(worker.name, lost, preempted)]

    def _ask_pulses(self) -> None:
        now = time.monotonic()
        for worker in self._workers.values():
            if worker.loading is None and worker.pulse is None and now - worker.pulse_asked > PULSE_S:
                worker.pulse, worker.pulse_asked = worker.actor.stats.remote(), now

    def _waiting(self) -> list[CrewEvent]:
        """Once: encoders that are not up yet, and what the cluster would need."""
        now = time.monotonic()
        late = [w for w in self._workers.values() if w.loading is not None and now - w.created_at > PLACEMENT_S]
        if not late or self._told_waiting:
            return []
        self._told_waiting = True
        gpus = 1 if self._blueprint.device.startswith("cuda") else 0
        free = ray.available_resources()
        return [
            Notice(
                f"{len(late)} encoders are not up after {PLACEMENT_S:.0f} s; each asks for {self._blueprint.job.engine.encoder_cpus:g} "
                f"CPU and {gpus} GPU, free now are {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU; waiting on"
            )
        ]

    def _hung(self) -> list[CrewEvent]:
        limit = self._blueprint.job.engine.hang_s
        now = time.monotonic()
        silent = [w for w in self._workers.values() if w.shards and now - w.alive_at > limit]
        return [
            event
            for worker in silent
            for event in self._gone(worker, WorkerLost(f"no progress for {limit:g} s (engine.hang_s)"))
        ]


def encoders_for(blueprint: Blueprint, cluster: Cluster) -> int:
    """How many encoders the job gets: what it asks for, else one per GPU, else one per node."""
    asked = blueprint.job.engine.encoders
    if blueprint.device.startswith("cuda"):
        return asked or max(1, int(cluster.gpus))
    return asked or (1 if cluster.local else max(1, cluster.nodes))

"""`WorkerPool` of encoder actors: creates, watches and replaces them.

Takes assignments, gives pool events; `dispatch` decides what a failure means for shards. Answers of actors arrive in one queue by a
callback, so a poll costs the same with ten encoders as with a thousand. All time limits use the attended clock, which stands still while
the driver does not poll: a driver that was stopped for a while does not blame encoders for that time.
"""

from __future__ import annotations

import heapq
import os
import queue
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from pipeline.engine.ray.actors import EncoderActor
from pipeline.engine.ray.losses import LoadFailures, describe_loss
from pipeline.engine.worker.pool import Notice, PoolEvent, Pulse, ShardEnded, WorkerGone, WorkerUp, decoders_per_encoder
from pipeline.errors import FatalError, WorkerLost

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipeline.engine.ray.session import Cluster
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import Shard

PULSE_S = 2.0  # between two pulses of an encoder; longer with many encoders
PULSES_A_SECOND = 100
WATCH_S = 0.5  # between two checks of all encoders
PLACEMENT_S = 30.0  # before a notice that encoders wait for resources
LOAD_S = 900.0  # for an encoder to load its network, from when it has a node; waiting for a node is not hanging
UNAVAILABLE_S = 60.0  # without a connection to an actor, before it counts as lost
AGAIN_S = 1.0  # before a call to an unavailable actor is repeated
CLOSE_S = 5.0  # for encoders to end their attempts and decoders by themselves
ANSWERS_A_POLL = 1000
LONGEST_TURN_S = 2.0  # the attended clock advances by at most this between two polls


@dataclass(slots=True)
class _Worker:
    name: str
    actor: Any
    created_at: float  # this and all below on the attended clock
    node: str | None = None
    placed_at: float | None = None
    up: bool = False
    shards: dict[int, Shard] = field(default_factory=dict)  # by ticket
    pulse_out: bool = False
    alive_at: float = 0.0  # last sign of progress
    progress: int = -1  # the worker's own count at its last pulse
    unavailable_since: float | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """A method call of an actor. `ticket` numbers the assignment of a `run_shard`."""

    worker: str
    method: str
    ticket: int = 0


class RayPool:
    """See the module."""

    def __init__(self, context: BuildContext, cluster: Cluster) -> None:
        self._context = context
        self._workers: dict[str, _Worker] = {}
        self._answers: queue.SimpleQueue[tuple[_Call, Future[Any]]] = queue.SimpleQueue()
        self._again: list[tuple[float, int, _Call]] = []  # heap of calls to repeat
        self._pulses: deque[tuple[float, str]] = (
            deque()
        )  # (time, worker) of the next calls of `stats`, in order: the period is the same for all
        self._created = self._tickets = self._wanted = self._up = 0
        self._failures = LoadFailures(context.job.engine.outage_s)
        self._waiting_shown = False
        self._attended = 0.0
        self._polled_at = time.monotonic()
        self._watch_at = 0.0
        self.size = encoders_for(context, cluster)
        engine = context.job.engine
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
            record.alive_at = self._attended
        self._tickets += 1
        record.shards[self._tickets] = shard
        self._ask(_Call(worker, "run_shard", self._tickets))

    def poll(self, timeout_s: float) -> list[PoolEvent]:  # noqa: D102
        now = time.monotonic()
        self._attended += min(now - self._polled_at, LONGEST_TURN_S, self._context.job.engine.hang_s / 4)
        self._polled_at = now
        self._ask_pulses(now)
        while self._again and self._again[0][0] <= now:
            self._ask(heapq.heappop(self._again)[2])
        events: list[PoolEvent] = []
        for call, answer in self._arrived(timeout_s):
            worker = self._workers.get(call.worker)
            if worker is not None:
                events += self._settle(worker, call, answer)
        if now >= self._watch_at:
            self._watch_at = now + WATCH_S
            events += self._stuck() + self._waiting() + self._replace(now)
        return events

    def close(self) -> None:  # noqa: D102
        placed = [worker.actor.shutdown.remote() for worker in self._workers.values() if worker.node is not None]
        if placed:
            ray.wait(placed, num_returns=len(placed), timeout=CLOSE_S)
        for worker in self._workers.values():
            ray.kill(worker.actor, no_restart=True)
        self._workers.clear()

    # --- calls and answers ----------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._created += 1
        options: dict[str, Any] = {
            "num_cpus": self._context.job.engine.encoder_cpus,
            "num_gpus": 1 if self._context.device.startswith("cuda") else 0,
            "name": None,
        }
        if (excluded := self._failures.excluded(_nodes_alive, time.monotonic())) is not None:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(excluded)})"}
        actor = EncoderActor.options(**options).remote(self._context, self._decoders, self._threads)  # type: ignore[attr-defined]
        name = f"encoder-{self._created}"
        self._workers[name] = _Worker(name, actor, self._attended)
        self._ask(_Call(name, "where"))
        self._ask(_Call(name, "load"))

    def _ask(self, call: _Call) -> None:
        worker = self._workers.get(call.worker)
        if worker is None or (call.method == "run_shard" and call.ticket not in worker.shards):
            return
        method = getattr(worker.actor, call.method)
        ref = method.remote(worker.shards[call.ticket], call.ticket) if call.method == "run_shard" else method.remote()
        ref.future().add_done_callback(lambda answer: self._answers.put((call, answer)))

    def _arrived(self, timeout_s: float) -> list[tuple[_Call, Future[Any]]]:
        """Answers that have arrived; waits for the first."""
        answers: list[tuple[_Call, Future[Any]]] = []
        with suppress(queue.Empty):
            answers.append(self._answers.get(timeout=timeout_s))
            while len(answers) < ANSWERS_A_POLL:
                answers.append(self._answers.get_nowait())
        return answers

    def _settle(self, worker: _Worker, call: _Call, answer: Future[Any]) -> list[PoolEvent]:
        try:
            value = answer.result()
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            # While others work, an encoder without a device, hub or decoders is lost alone. `_gone` judges encoders that load.
            if isinstance(cause, FatalError) and worker.up and self._up == 1:
                raise cause from error
            return self._gone(worker, cause)
        except ActorUnavailableError as error:
            return self._unavailable(worker, call, error)
        except RayError as error:
            return self._gone(worker, error)
        worker.unavailable_since = None
        if call.method == "where":
            worker.node, worker.placed_at = value, self._attended
            return []
        if call.method == "load":
            return self._is_up(worker)
        if call.method == "stats":
            worker.pulse_out = False
            if value.progress != worker.progress:
                worker.progress, worker.alive_at = value.progress, self._attended
            return [Pulse(worker.name, value)]
        if worker.shards.pop(call.ticket, None) is None:
            return []  # the answer to a call that was repeated
        worker.alive_at = self._attended
        return [ShardEnded(worker.name, value)]

    def _is_up(self, worker: _Worker) -> list[PoolEvent]:
        if worker.up:
            return []
        worker.up, worker.alive_at = True, self._attended
        self._up += 1
        self._failures.succeeded()
        self._pulses.append((time.monotonic(), worker.name))
        return [WorkerUp(worker.name)]

    def _unavailable(self, worker: _Worker, call: _Call, error: ActorUnavailableError) -> list[PoolEvent]:
        if worker.unavailable_since is None:
            worker.unavailable_since = self._attended
        if self._attended - worker.unavailable_since > UNAVAILABLE_S:
            return self._gone(worker, error)
        if call.method == "stats":
            worker.pulse_out = False
        else:
            heapq.heappush(self._again, (time.monotonic() + AGAIN_S, id(call), call))
        return []

    def _gone(self, worker: _Worker, error: Exception) -> list[PoolEvent]:
        del self._workers[worker.name]
        ray.kill(worker.actor, no_restart=True)
        why, cause = describe_loss(error)
        if worker.up:
            self._up -= 1
            return [WorkerGone(worker.name, WorkerLost(f"{worker.name} lost: {why}"), cause)]
        others = self._up + sum(not other.up and not self._has_no_room(other) for other in self._workers.values())
        next_start = self._failures.failed(worker.node, error, why, others=others, now=time.monotonic())
        return [WorkerGone(worker.name, WorkerLost(f"{worker.name} did not come up: {why}{next_start}"), cause)]

    # --- checks -------------------------------------------------------------------------------------------------------

    def _ask_pulses(self, now: float) -> None:
        period = min(max(PULSE_S, len(self._workers) / PULSES_A_SECOND), self._context.job.engine.hang_s / 4)
        while self._pulses and self._pulses[0][0] <= now:
            _, name = self._pulses.popleft()
            if (worker := self._workers.get(name)) is None:
                continue
            if not worker.pulse_out:
                worker.pulse_out = True
                self._ask(_Call(name, "stats"))
            self._pulses.append((now + period, name))

    def _stuck(self) -> list[PoolEvent]:
        """Ends encoders that hold shards without progress, and those that load for too long."""
        limit = self._context.job.engine.hang_s
        stuck = [
            (worker, f"no progress for {limit:g} s (engine.hang_s)")
            for worker in self._workers.values()
            if worker.shards and self._attended - worker.alive_at > limit
        ]
        stuck += [
            (worker, f"its network was not loaded after {LOAD_S:g} s")
            for worker in self._workers.values()
            if not worker.up and worker.placed_at is not None and self._attended - worker.placed_at > LOAD_S
        ]
        return [event for worker, why in stuck for event in self._gone(worker, WorkerLost(why))]

    def _has_no_room(self, worker: _Worker) -> bool:
        return worker.node is None and self._attended - worker.created_at > PLACEMENT_S

    def _replace(self, now: float) -> list[PoolEvent]:
        if now >= self._failures.create_at:
            self.start(self._wanted)
        return [Notice(text) for text in self._failures.notices()]

    def _waiting(self) -> list[PoolEvent]:
        """A notice, once, that encoders have no node yet, with what they need."""
        late = [worker for worker in self._workers.values() if self._has_no_room(worker)]
        if not late or self._waiting_shown:
            return []
        self._waiting_shown = True
        gpus = 1 if self._context.device.startswith("cuda") else 0
        free = ray.available_resources()
        return [
            Notice(
                f"{len(late)} encoders have no node after {PLACEMENT_S:.0f} s; each needs {self._context.job.engine.encoder_cpus:g} "
                f"CPU and {gpus} GPU, free are {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU; still waiting"
            )
        ]


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node.get("Alive")}


def encoders_for(context: BuildContext, cluster: Cluster) -> int:
    """Number of encoders: as the job says, else one per GPU, else one per node."""
    asked = context.job.engine.encoders
    if context.device.startswith("cuda"):
        return asked or max(1, int(cluster.gpus))
    return asked or (1 if cluster.local else max(1, cluster.nodes))

"""`WorkerPool` of encoder actors: creates, watches and replaces them.

Takes assignments, gives pool events; `dispatch` decides what a failure means for shards. Answers of actors arrive in one queue by a
callback, so a poll costs the same with ten encoders as with a thousand. All time limits use the attended clock, which stands still while
the driver does not poll: a driver that was stopped for a while does not blame encoders for that time.

An encoder that is lost is reported once its record was read on its node (`DeathRecord`): until then it takes no shards. One whose node is
drained hands its shards back and leaves. No call here waits for Ray's head, which may be away.
"""

from __future__ import annotations

import heapq
import queue
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.engine.ray import session
from pipeline.engine.ray.actors import EncoderActor
from pipeline.engine.ray.cluster_watch import ClusterWatch, ask_head
from pipeline.engine.ray.encoder_state import Call, EncoderState
from pipeline.engine.ray.losses import LoadFailures, describe_loss, judge_loss
from pipeline.engine.ray.node_health import NodeHealth
from pipeline.engine.ray.placement import check_placement, decoders_for, encoder_cpus, encoders_for, waiting_line
from pipeline.engine.worker.death_record import take_death
from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import (
    NodeAvoided,
    Notice,
    PoolEvent,
    Pulse,
    ShardEnded,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from pipeline.errors import BuildError, CheckpointDiffers, FatalError, HandedBack, StorageUnavailable, WorkerLost

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipeline.engine.ray.session import Cluster
    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.death_record import Death
    from pipeline.records import Shard

PULSE_S = 2.0  # between two pulses of an encoder; longer with many encoders
PULSES_A_SECOND = 100
WATCH_S = 0.5  # between two checks of all encoders
PLACEMENT_S = 30.0  # before a notice that encoders wait for resources
LOAD_S = 300.0  # without progress while an encoder that has a node loads its network; waiting for a node is not hanging
UNAVAILABLE_S = 60.0  # without a connection to an actor, before it counts as lost
DRAIN_S = 5.0  # between two reports that an encoder's node goes away
AGAIN_S = 1.0  # before a call to an unavailable actor is repeated
RECORD_S = 30.0  # for the node of a lost encoder to read its record; without it only Ray's words are known
HEAD_S = 30.0  # without an answer of Ray's head before the build stops; Ray aborts the driver after 60 s
LOSSES = 12  # encoders in a row ended by their own work, with no shard finished meanwhile, before the build stops
CLOSE_S = 5.0  # for encoders to end their attempts and decoders by themselves
ANSWERS_A_POLL = 1000
LONGEST_TURN_S = 2.0  # the attended clock advances by at most this between two polls


class RayPool:
    """See the module."""

    def __init__(self, context: BuildContext, cluster: Cluster) -> None:
        self._context = context
        self._workers: dict[str, EncoderState] = {}
        self._answers: queue.SimpleQueue[tuple[Call, Future[Any]]] = queue.SimpleQueue()
        self._again: list[tuple[float, int, Call]] = []  # heap of calls to repeat
        # (time, worker) of the next calls of `stats`, in order: the period is the same for all
        self._pulses: deque[tuple[float, str]] = deque()
        self._created = self._tickets = self._wanted = self._up = 0
        self._failures = LoadFailures(context.job.engine.outage_s)
        self._health = NodeHealth()
        self._losses = 0  # in a row, see `LOSSES`
        self._early: list[PoolEvent] = []
        self._waiting_shown = False
        self._home = ray.get_runtime_context().get_node_id()
        self._attended = 0.0
        self._polled_at = time.monotonic()
        self._watch_at = 0.0
        self._gpus = 1 if context.device.startswith("cuda") else 0  # of an encoder
        self.size = encoders_for(context, cluster)
        engine = context.job.engine
        cores = cluster.cores if cluster.local else cluster.cpus
        self._decoders = decoders_for(context, cluster, self.size)
        self._cluster = cluster
        self._threads = engine.threads or max(1, int(cores // max(self.size, cluster.nodes)))
        self._cpus = encoder_cpus(context, self._decoders)  # of an encoder
        self._watch = ClusterWatch(partial(ask_head, self._home, self._cpus, self._gpus))
        self._head_lost = False

    def start(self, wanted: int) -> None:  # noqa: D102
        self._wanted = min(wanted, self.size)
        if not self._created and (line := check_placement(self._context, self._cluster, self._wanted, self._decoders)):
            self._early.append(Notice(line))
        missing = self._wanted - sum(w.lost is None and w.drained_at is None for w in self._workers.values())
        for _ in range(missing):
            self._create()

    def assign(self, worker: str, shard: Shard, blamed: tuple[BlamedVideo, ...] = ()) -> None:  # noqa: D102
        record = self._workers[worker]
        self._health.excuse(blamed)
        if record.lost is not None:
            gone = HandedBack(f"{worker} is gone")
            self._early.append(ShardEnded(worker, ShardFailure(shard.id(self._context.fingerprint), gone)))
            return
        if not record.shards:
            record.alive_at = self._attended
        self._tickets += 1
        record.shards[self._tickets] = shard, blamed
        self._ask(Call(worker, "run_shard", self._tickets))

    def hand_back(self, worker: str, shard_ids: list[str]) -> None:  # noqa: D102
        if (record := self._workers.get(worker)) is not None and record.lost is None:
            record.actor.hand_back.remote(shard_ids)

    def poll(self, timeout_s: float) -> list[PoolEvent]:  # noqa: D102
        now = time.monotonic()
        self._attended += min(now - self._polled_at, LONGEST_TURN_S, self._context.job.engine.hang_s / 4)
        self._polled_at = now
        self._ask_pulses(now)
        while self._again and self._again[0][0] <= now:
            self._ask(heapq.heappop(self._again)[2])
        events, self._early = self._early, []
        for call, answer in self._arrived(0.0 if events else timeout_s):
            worker = self._workers.get(call.worker)
            if worker is not None:
                events += self._settle(worker, call, answer)
        if now >= self._watch_at:
            self._watch_at = now + WATCH_S
            self._check_head()
            events += self._drained() + self._stuck() + self._waiting() + self._replace(now)
        return events

    def close(self) -> None:  # noqa: D102
        self._watch.close()
        if self._head_lost:  # calls that need the head would not return; the actors end with this process
            session.abandon()
            return
        ends = [worker.actor for worker in self._workers.values() if worker.place is not None and worker.lost is None]
        placed = [actor.shutdown.remote() for actor in ends]
        if placed:
            ray.wait(placed, num_returns=len(placed), timeout=CLOSE_S)
        for worker in self._workers.values():
            ray.kill(worker.actor, no_restart=True)
        self._workers.clear()

    # --- calls and answers ----------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._created += 1
        options: dict[str, Any] = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "name": None,
        }
        if avoided := self._avoided():
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoided)})"}
        actor = EncoderActor.options(**options).remote(self._context, self._decoders, self._threads)  # type: ignore[attr-defined]
        name = f"encoder-{self._created}"
        self._workers[name] = EncoderState(name, actor, self._attended, avoided)
        self._ask(Call(name, "where"))
        self._ask(Call(name, "load"))

    def _ask(self, call: Call) -> None:
        worker = self._workers.get(call.worker)
        if worker is None or (call.method == "run_shard" and call.ticket not in worker.shards):
            return
        method = getattr(worker.actor, call.method)
        arguments = (*worker.shards[call.ticket], call.ticket) if call.method == "run_shard" else ()
        self._listen(call, method.remote(*arguments))

    def _listen(self, call: Call, ref: Any) -> None:
        ref.future().add_done_callback(lambda answer: self._answers.put((call, answer)))

    def _arrived(self, timeout_s: float) -> list[tuple[Call, Future[Any]]]:
        """Answers that have arrived; waits for the first."""
        answers: list[tuple[Call, Future[Any]]] = []
        with suppress(queue.Empty):
            answers.append(self._answers.get(timeout=timeout_s))
            while len(answers) < ANSWERS_A_POLL:
                answers.append(self._answers.get_nowait())
        return answers

    def _settle(self, worker: EncoderState, call: Call, answer: Future[Any]) -> list[PoolEvent]:
        if worker.lost is not None:
            if call.method != "death":
                return []
            return self._report_loss(worker, answer.result() if answer.exception() is None else None)
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
            worker.place, worker.alive_at = value, self._attended
            self._pulses.append((time.monotonic(), worker.name))
            return []
        if call.method == "load":
            return self._is_up(worker)
        if call.method == "shutdown":
            return self._left(worker)
        if call.method == "stats":
            worker.pulse_out = False
            if value.progress != worker.progress:
                worker.progress, worker.alive_at = value.progress, self._attended
            return [Pulse(worker.name, value)] if worker.up else []
        if worker.shards.pop(call.ticket, None) is None:
            return []  # the answer to a call that was repeated
        worker.alive_at = self._attended
        if not isinstance(value, ShardFailure):
            self._losses = 0
        return [ShardEnded(worker.name, value)]

    def _is_up(self, worker: EncoderState) -> list[PoolEvent]:
        if worker.up:
            return []
        worker.up, worker.alive_at = True, self._attended
        self._up += 1
        self._failures.succeeded()
        return [WorkerUp(worker.name, worker.place.node if worker.place is not None else "")]

    def _unavailable(self, worker: EncoderState, call: Call, error: ActorUnavailableError) -> list[PoolEvent]:
        if worker.unavailable_since is None:
            worker.unavailable_since = self._attended
        if self._attended - worker.unavailable_since > UNAVAILABLE_S:
            return self._gone(worker, error)
        if call.method == "stats":
            worker.pulse_out = False
        else:
            heapq.heappush(self._again, (time.monotonic() + AGAIN_S, id(call), call))
        return []

    # --- losses ---------------------------------------------------------------------------------------------------

    def _gone(self, worker: EncoderState, error: Exception) -> list[PoolEvent]:
        """The encoder is lost: its record is read, here or by a task on its node, and `WorkerGone` follows."""
        worker.lost, worker.lost_at = error, self._attended
        self._up -= worker.up
        ray.kill(worker.actor, no_restart=True)
        if worker.place is None or describe_loss(error)[1] in ("node", "preempted"):
            return self._report_loss(worker, None)
        if worker.place.node == self._home:
            return self._report_loss(worker, take_death(worker.place.record))
        there = NodeAffinitySchedulingStrategy(worker.place.node, soft=False)
        self._listen(
            Call(worker.name, "death"),
            _take_death.options(scheduling_strategy=there).remote(worker.place.record),
        )
        return [WorkerDraining(worker.name, float("inf"))] if worker.up else []  # it takes no shards until then

    def _report_loss(self, worker: EncoderState, death: Death | None) -> list[PoolEvent]:
        error = worker.lost
        if error is None:
            raise RuntimeError(f"{worker.name} is not lost")
        del self._workers[worker.name]
        loss, place, now = judge_loss(error, death), worker.place, time.monotonic()
        step = death.videos if death is not None and loss.blame else ()
        of_node = not (loss.cause in ("node", "preempted") or loss.sent or isinstance(error, StorageUnavailable))
        if place is not None and of_node:
            gpu = ",".join(place.gpus) if loss.device else None
            certain = not worker.up and (loss.device or isinstance(error, FatalError | CheckpointDiffers))
            self._health.failed(place.node, loss.line, now, host=place.host, gpu=gpu, certain=certain, step=step)
        if worker.up:
            self._losses = self._losses + 1 if loss.blame else self._losses
            if self._losses >= LOSSES:
                raise BuildError(
                    f"{self._losses} encoders in a row ended by their own work, and no shard was finished meanwhile; last: {loss.line}; "
                    "repair the machine or leave out these inputs; the same command resumes"
                )
            return [WorkerGone(worker.name, WorkerLost(f"{worker.name} lost: {loss.line}"), loss.cause, step)]
        loading = [other for other in self._workers.values() if not other.up and other.lost is None]
        others = self._up + sum(not self._has_no_room(other) for other in loading)
        # Without a node it cannot be created at all, unless its process or its node ended meanwhile.
        ended = isinstance(error, RayActorError) and not error.actor_init_failed
        hopeless = (place is None and not ended) or self._health.all_certain(lambda: self._watch.alive, now)
        next_start = self._failures.failed(error, loss.line, others=others, hopeless=hopeless, now=now)
        return [
            WorkerGone(worker.name, WorkerLost(f"{worker.name} did not come up: {loss.line}{next_start}"), loss.cause)
        ]

    def _left(self, worker: EncoderState) -> list[PoolEvent]:
        """An encoder whose node goes away has ended its decoders and files."""
        del self._workers[worker.name]
        self._up -= worker.up
        ray.kill(worker.actor, no_restart=True)
        return [WorkerGone(worker.name, WorkerLost(f"{worker.name} left its node, which goes away"), "preempted")]

    # --- checks -------------------------------------------------------------------------------------------------------

    def _ask_pulses(self, now: float) -> None:
        period = min(max(PULSE_S, len(self._workers) / PULSES_A_SECOND), self._context.job.engine.hang_s / 4)
        while self._pulses and self._pulses[0][0] <= now:
            _, name = self._pulses.popleft()
            if (worker := self._workers.get(name)) is None:
                continue
            if not worker.pulse_out:
                worker.pulse_out = True
                self._ask(Call(name, "stats"))
            self._pulses.append((now + period, name))

    def _check_head(self) -> None:
        """Raises BuildError where Ray's head does not answer for `HEAD_S`: nothing can be started or replaced without it."""
        if self._watch.silent_s(self._attended) > HEAD_S:
            self._head_lost = True
            why = f" ({self._watch.failure})" if self._watch.failure else ""
            raise BuildError(
                f"the head of the Ray cluster has not answered for {HEAD_S:g} s, or was started anew{why}; finished shards are kept, and "
                "the same command resumes"
            )

    def _drained(self) -> list[PoolEvent]:
        """Encoders whose nodes go away: reported again and again; those that hold nothing end."""
        events: list[PoolEvent] = []
        for worker in list(self._workers.values()) if self._watch.draining else ():
            if worker.place is None or worker.lost is not None or worker.leaving:
                continue
            if (deadline := self._watch.draining.get(worker.place.node)) is None:
                continue
            if first := worker.drained_at is None:
                when = f"in {deadline - time.time():.0f} s; its shards are finished by then or handed back"
                if deadline == float("inf"):
                    when = "at an unknown time; it finishes its shards"
                events.append(Notice(f"{worker.name}: its node {worker.place.host} goes away {when}"))
            if worker.shards or (first and worker.up):
                if worker.drained_at is None or self._attended - worker.drained_at > DRAIN_S:
                    worker.drained_at = self._attended
                    events.append(WorkerDraining(worker.name, max(0.0, deadline - time.time())))
            else:
                worker.drained_at, worker.leaving = self._attended, True
                self._ask(Call(worker.name, "shutdown"))
        return events

    def _stuck(self) -> list[PoolEvent]:
        """Ends encoders that hold shards or load without progress; reports lost ones whose record does not come."""
        limit, events = self._context.job.engine.hang_s, []
        for worker in list(self._workers.values()):
            silent_s = self._attended - worker.alive_at
            if worker.lost is not None:
                events += self._report_loss(worker, None) if self._attended - worker.lost_at > RECORD_S else []
            elif worker.shards and silent_s > limit:
                events += self._gone(worker, WorkerLost(f"no progress for {limit:g} s (engine.hang_s)", blame=True))
            elif not worker.up and worker.place is not None and silent_s > LOAD_S:
                events += self._gone(worker, WorkerLost(f"no progress in loading for {LOAD_S:g} s", blame=True))
        return events

    def _has_no_room(self, worker: EncoderState) -> bool:
        return worker.place is None and self._attended - worker.created_at > PLACEMENT_S

    def _avoided(self) -> tuple[str, ...]:
        return tuple(self._health.avoided(lambda: self._watch.alive, time.monotonic()) or ())

    def _replace(self, now: float) -> list[PoolEvent]:
        """Creates encoders that are missing. Those that wait for a node are created anew where other nodes are avoided by now."""
        avoided = self._avoided()
        if avoided and not self._up and self._workers and all(map(self._has_no_room, self._workers.values())):
            self._health.forget()  # no other node has room
            return [
                Notice(
                    f"no node has room for an encoder but those that are avoided ({len(avoided)}): they are used again"
                )
            ]
        for worker in [w for w in self._workers.values() if w.place is None and w.avoided != avoided]:
            del self._workers[worker.name]
            ray.kill(worker.actor, no_restart=True)
        if now >= self._failures.create_at:
            self.start(self._wanted)
        return [NodeAvoided(node, text) for node, text in self._health.newly_avoided()]

    def _waiting(self) -> list[PoolEvent]:
        """A notice, once, that encoders have no node yet, with what they need."""
        late = [worker for worker in self._workers.values() if self._has_no_room(worker)]
        if not late or self._waiting_shown:
            return []
        self._waiting_shown = True
        return [Notice(waiting_line(len(late), self._cpus, self._gpus, PLACEMENT_S))]


_take_death = ray.remote(num_cpus=0, max_retries=0)(take_death)

"""A `RayPool` without Ray: the test answers for its two actors and for Ray's head."""

import queue
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError, RayTaskError

from pipeline.engine.ray import pool as ray_pool
from pipeline.engine.ray.actors import Place
from pipeline.engine.ray.encoder_state import Call, EncoderState
from pipeline.engine.ray.losses import LoadFailures
from pipeline.engine.ray.node_health import NodeHealth
from pipeline.engine.worker.blamed_video import StepVideo
from pipeline.engine.worker.death_record import Death

STEP = (StepVideo("shard", "x.tar", "a"),)


class Calls:
    """An actor whose answers the test gives."""

    def __init__(self):
        self.asked = {}

    def __getattr__(self, method):
        def remote(*_):
            self.asked[method] = Future()
            return SimpleNamespace(future=lambda: self.asked[method])

        return SimpleNamespace(remote=remote)


@pytest.fixture
def pool(monkeypatch):
    """Two encoders on two nodes that were asked to load. Their actors, and Ray's head, are the test's."""
    monkeypatch.setattr(ray_pool.ray, "kill", lambda actor, no_restart: actor.asked.setdefault("kill", True))
    monkeypatch.setattr(ray_pool, "take_death", lambda path: Death(None, "encode", STEP) if path == "step" else None)
    pool = object.__new__(ray_pool.RayPool)
    engine = SimpleNamespace(hang_s=600.0, encoder_cpus=1, outage_s=3600.0)
    pool._context = SimpleNamespace(job=SimpleNamespace(engine=engine), device="cpu")
    pool._answers, pool._again, pool._pulses = queue.SimpleQueue(), [], deque()
    pool._tickets = pool._up = pool._losses = 0
    pool._created = pool._wanted = pool.size = 2
    pool._failures, pool._health, pool._early = LoadFailures(3600), NodeHealth(), []
    head = {"alive": {"node-1", "node-2"}, "draining": {}, "failure": ""}
    pool._watch = SimpleNamespace(**head, silent_s=lambda now: 0.0, close=lambda: None)
    pool._gpus, pool._home, pool._waiting_shown, pool._head_lost = 0, "node-1", False, False
    pool._attended, pool._polled_at, pool._watch_at = 0.0, time.monotonic(), float("inf")
    pool._workers = {name: EncoderState(name, Calls(), 0.0) for name in ("encoder-1", "encoder-2")}
    for name in pool._workers:
        pool._ask(Call(name, "where"))
        pool._ask(Call(name, "load"))
    return pool


def add(pool, name, node):
    """One more encoder, which is up."""
    pool._workers[name] = EncoderState(
        name, Calls(), 0.0, place=Place(node, f"host of {node}", ("0",), "step"), up=True
    )
    pool._up += 1


def place(pool, name, node, record="step"):
    """The encoder has a node."""
    return answer(pool, name, "where", Place(node, f"host of {node}", ("0",), record))


def answer(pool, name, method, value):
    future = pool._workers[name].actor.asked[method]
    if isinstance(value, RayError):
        future.set_exception(value)
    elif isinstance(value, Exception):
        future.set_exception(RayTaskError(method, "traceback", value).as_instanceof_cause())
    else:
        future.set_result(value)
    return pool.poll(1.0)

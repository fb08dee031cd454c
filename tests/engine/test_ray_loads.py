"""An encoder that cannot work does not stop the others; repeated calls of `load` load once."""

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from pipeline.engine.ray import pool as ray_pool
from pipeline.engine.ray.actors import EncoderActor
from pipeline.engine.ray.losses import LOAD_FAILURES, LoadFailures
from pipeline.engine.worker.encode_loop import EncodeLoop
from pipeline.engine.worker.pool import WorkerGone, WorkerUp
from pipeline.errors import AccessError, BuildError, CheckpointError, ConfigError
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build

FATAL = [
    ConfigError("model.device: cuda was asked for, but this process sees no CUDA device"),
    AccessError("model.checkpoint: the hub did not answer"),
    BuildError("6 decoder processes in a row died before they were up; the last: x"),
]


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
    """Two encoders that were asked to load."""
    monkeypatch.setattr(ray_pool.ray, "kill", lambda actor, no_restart: None)
    pool = object.__new__(ray_pool.RayPool)
    engine = SimpleNamespace(hang_s=600.0, encoder_cpus=1, outage_s=3600.0)
    pool._context = SimpleNamespace(job=SimpleNamespace(engine=engine), device="cpu")
    pool._answers, pool._again, pool._pulses = queue.SimpleQueue(), [], deque()
    pool._created = pool._tickets = pool._wanted = pool._up = 0
    pool._failures = LoadFailures(3600)
    pool._attended, pool._polled_at, pool._watch_at = 0.0, time.monotonic(), float("inf")
    pool._workers = {name: ray_pool._Worker(name, Calls(), 0.0) for name in ("encoder-1", "encoder-2")}
    for name in pool._workers:
        pool._ask(ray_pool._Call(name, "load"))
    return pool


def answer(pool, name, method, value):
    future = pool._workers[name].actor.asked[method]
    if isinstance(value, Exception):
        future.set_exception(RayTaskError(method, "traceback", value).as_instanceof_cause())
    else:
        future.set_result(value)
    return pool.poll(1.0)


@pytest.mark.parametrize("error", FATAL)
def test_encoder_that_cannot_load_does_not_stop_the_others(pool, error):
    assert answer(pool, "encoder-2", "load", {}) == [WorkerUp("encoder-2")]
    (event,) = answer(pool, "encoder-1", "load", error)
    assert isinstance(event, WorkerGone)
    assert f"encoder-1 did not come up: {error.message}" in str(event.error)


def test_load_error_of_all_encoders_stops_the_build_with_that_error(pool):
    error = CheckpointError("w.ckpt: weights of another network")
    assert len(answer(pool, "encoder-1", "load", error)) == 1  # the other may come up
    with pytest.raises(CheckpointError, match="another network") as caught:
        answer(pool, "encoder-2", "load", error)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", FATAL)
def test_failed_loop_of_one_encoder_does_not_stop_the_others(pool, error):
    answer(pool, "encoder-1", "load", {})
    answer(pool, "encoder-2", "load", {})
    pool._workers["encoder-1"].shards[7] = "a shard"
    pool._ask(ray_pool._Call("encoder-1", "run_shard", 7))
    (event,) = answer(pool, "encoder-1", "run_shard", error)
    assert "encoder-1 lost" in str(event.error)
    pool._workers["encoder-2"].shards[8] = "a shard"
    pool._ask(ray_pool._Call("encoder-2", "run_shard", 8))
    with pytest.raises(type(error)):
        answer(pool, "encoder-2", "run_shard", error)


def test_after_an_encoder_was_up_a_load_that_fails_is_tried_again_and_then_fails_the_build():
    failures = LoadFailures(3600)
    failures.succeeded()
    for n in range(LOAD_FAILURES - 1):
        failures.failed("a", AccessError("the hub did not answer"), "the hub did not answer", others=0, now=float(n))
    with pytest.raises(BuildError, match="no encoder is up") as caught:
        failures.failed("a", AccessError("the hub did not answer"), "the hub did not answer", others=0, now=9.0)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("up", "code"), [(True, 1), (False, 2)])
def test_an_error_of_the_pool_is_one_of_the_build_once_an_encoder_was_up(tmp_path, monkeypatch, up, code):
    pool = ScriptedPool(lambda shard, run: None)
    polls = [pool.poll] if up else []

    def poll(timeout_s):
        if polls:
            return polls.pop()(timeout_s)
        raise ConfigError("model.device: no CUDA device")

    monkeypatch.setattr(pool, "poll", poll)
    build, _, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool)
    with pytest.raises((BuildError, ConfigError), match=r"no CUDA device") as caught:
        build.run()
    assert caught.value.exit_code == code


@pytest.mark.parametrize("outcome", [{"pid": 1}, AccessError("the hub did not answer")])
def test_repeated_load_returns_the_first_answer(monkeypatch, outcome):
    plain = EncoderActor.__ray_actor_class__
    actor, loads, may_end = plain(None, 1, None), [], threading.Event()

    def load(self):
        loads.append(1)
        may_end.wait(60)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(plain, "_load", load)
    answers = []

    def ask():
        try:
            answers.append(actor.load())
        except AccessError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert (len(loads), answers) == (1, [outcome] * 3)


def test_encoder_whose_decoders_do_not_start_fails_at_once():
    actor = EncoderActor.__ray_actor_class__(None, 1, None)
    actor._loop = object.__new__(EncodeLoop)
    actor._loop._feed = SimpleNamespace(failure=FATAL[2], ready_lanes=0)
    with pytest.raises(BuildError, match="6 decoder processes"):
        actor._await_decoder()

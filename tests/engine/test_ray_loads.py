"""One encoder that cannot work does not stop those that can; `load` is done once, however often it is asked."""

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from pipeline.engine.ray import crew as ray_crew
from pipeline.engine.ray.actors import EncoderActor
from pipeline.engine.ray.losses import LOAD_FAILURES, LoadFailures
from pipeline.engine.worker.crew import WorkerGone, WorkerUp
from pipeline.engine.worker.encode_loop import EncodeLoop
from pipeline.errors import AccessError, BuildError, CheckpointError, ConfigError
from tests.engine.scripted_crew import ProbedStore, ScriptedCrew, make_build

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
def crew(monkeypatch):
    """Two encoders that were asked to load."""
    monkeypatch.setattr(ray_crew.ray, "kill", lambda actor, no_restart: None)
    crew = object.__new__(ray_crew.RayCrew)
    engine = SimpleNamespace(hang_s=600.0, encoder_cpus=1, outage_s=3600.0)
    crew._blueprint = SimpleNamespace(job=SimpleNamespace(engine=engine), device="cpu")
    crew._answers, crew._again, crew._pulses = queue.SimpleQueue(), [], deque()
    crew._created = crew._tickets = crew._wanted = crew._up = 0
    crew._failures = LoadFailures(3600)
    crew._attended, crew._polled_at, crew._watch_at = 0.0, time.monotonic(), float("inf")
    crew._workers = {name: ray_crew._Worker(name, Calls(), 0.0) for name in ("encoder-1", "encoder-2")}
    for name in crew._workers:
        crew._ask(ray_crew._Call(name, "load"))
    return crew


def answer(crew, name, method, value):
    future = crew._workers[name].actor.asked[method]
    if isinstance(value, Exception):
        future.set_exception(RayTaskError(method, "traceback", value).as_instanceof_cause())
    else:
        future.set_result(value)
    return crew.poll(1.0)


@pytest.mark.parametrize("error", FATAL)
def test_an_encoder_that_cannot_load_leaves_the_others_at_work(crew, error):
    assert answer(crew, "encoder-2", "load", {}) == [WorkerUp("encoder-2")]
    (event,) = answer(crew, "encoder-1", "load", error)
    assert isinstance(event, WorkerGone)
    assert f"encoder-1 did not come up: {error.message}" in str(event.error)


def test_what_no_encoder_can_load_stops_the_build_with_the_error_itself(crew):
    error = CheckpointError("w.ckpt: weights of another network")
    assert len(answer(crew, "encoder-1", "load", error)) == 1  # the other may come up
    with pytest.raises(CheckpointError, match="another network") as caught:
        answer(crew, "encoder-2", "load", error)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", FATAL)
def test_the_loop_of_one_encoder_that_ends_leaves_the_others_at_work(crew, error):
    answer(crew, "encoder-1", "load", {})
    answer(crew, "encoder-2", "load", {})
    crew._workers["encoder-1"].shards[7] = "a shard"
    crew._ask(ray_crew._Call("encoder-1", "run_shard", 7))
    (event,) = answer(crew, "encoder-1", "run_shard", error)
    assert "encoder-1 lost" in str(event.error)
    crew._workers["encoder-2"].shards[8] = "a shard"
    crew._ask(ray_crew._Call("encoder-2", "run_shard", 8))
    with pytest.raises(type(error)):
        answer(crew, "encoder-2", "run_shard", error)


def test_after_an_encoder_was_up_a_load_that_fails_is_tried_again_and_then_fails_the_build():
    failures = LoadFailures(3600)
    failures.succeeded()
    for n in range(LOAD_FAILURES - 1):
        failures.failed("a", AccessError("the hub did not answer"), "the hub did not answer", others=0, now=float(n))
    with pytest.raises(BuildError, match="no encoder is up") as caught:
        failures.failed("a", AccessError("the hub did not answer"), "the hub did not answer", others=0, now=9.0)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("up", "code"), [(True, 1), (False, 2)])
def test_an_error_of_the_crew_is_one_of_the_build_once_an_encoder_was_up(tmp_path, monkeypatch, up, code):
    crew = ScriptedCrew(lambda shard, run: None)
    polls = [crew.poll] if up else []

    def poll(timeout_s):
        if polls:
            return polls.pop()(timeout_s)
        raise ConfigError("model.device: no CUDA device")

    monkeypatch.setattr(crew, "poll", poll)
    build, _, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), crew)
    with pytest.raises((BuildError, ConfigError), match=r"no CUDA device") as caught:
        build.run()
    assert caught.value.exit_code == code


@pytest.mark.parametrize("outcome", [{"pid": 1}, AccessError("the hub did not answer")])
def test_load_is_done_once_and_answers_every_call_alike(monkeypatch, outcome):
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


def test_an_encoder_whose_decoders_do_not_start_says_so_at_once():
    actor = EncoderActor.__ray_actor_class__(None, 1, None)
    actor._loop = object.__new__(EncodeLoop)
    actor._loop._feed = SimpleNamespace(failure=FATAL[2], ready_lanes=0)
    with pytest.raises(BuildError, match="6 decoder processes"):
        actor._await_decoder()

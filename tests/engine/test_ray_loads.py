"""An encoder that cannot work does not stop the others; repeated calls of `load` load once."""

import threading
from types import SimpleNamespace

import pytest

from pipeline.engine.ray import actors
from pipeline.engine.ray.actors import EncoderActor
from pipeline.engine.ray.encoder_state import Call
from pipeline.engine.ray.losses import LOAD_FAILURES, LoadFailures
from pipeline.engine.worker.encode_loop import EncodeLoop
from pipeline.engine.worker.pool import WorkerGone, WorkerUp
from pipeline.errors import AccessError, BuildError, CheckpointError, ConfigError
from tests.engine.scripted_actors import answer, pool  # noqa: F401 - a fixture
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build

FATAL = [
    ConfigError("model.device: cuda was asked for, but this process sees no CUDA device"),
    AccessError("model.checkpoint: the hub did not answer"),
    BuildError("6 decoder processes in a row died before they were up; the last: x"),
]


@pytest.mark.parametrize("error", FATAL)
def test_encoder_that_cannot_load_does_not_stop_the_others(pool, error):  # noqa: F811
    assert answer(pool, "encoder-2", "load", {}) == [WorkerUp("encoder-2")]
    (event,) = answer(pool, "encoder-1", "load", error)
    assert isinstance(event, WorkerGone)
    assert f"encoder-1 did not come up: {error.message}" in str(event.error)


def test_load_error_of_all_encoders_stops_the_build_with_that_error(pool):  # noqa: F811
    error = CheckpointError("w.ckpt: weights of another network")
    assert len(answer(pool, "encoder-1", "load", error)) == 1  # the other may come up
    with pytest.raises(CheckpointError, match="another network") as caught:
        answer(pool, "encoder-2", "load", error)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", FATAL)
def test_failed_loop_of_one_encoder_does_not_stop_the_others(pool, error):  # noqa: F811
    answer(pool, "encoder-1", "load", {})
    answer(pool, "encoder-2", "load", {})
    pool._workers["encoder-1"].shards[7] = "a shard", ()
    pool._ask(Call("encoder-1", "run_shard", 7))
    (event,) = answer(pool, "encoder-1", "run_shard", error)
    assert "encoder-1 lost" in str(event.error)
    pool._workers["encoder-2"].shards[8] = "a shard", ()
    pool._ask(Call("encoder-2", "run_shard", 8))
    with pytest.raises(type(error)):
        answer(pool, "encoder-2", "run_shard", error)


def test_after_an_encoder_was_up_a_load_that_fails_is_tried_again_and_then_fails_the_build():
    failures = LoadFailures(3600)
    failures.succeeded()
    for n in range(LOAD_FAILURES - 1):
        failures.failed(AccessError("no answer"), "no answer", others=0, hopeless=False, now=float(n))
    with pytest.raises(BuildError, match="no encoder is up") as caught:
        failures.failed(AccessError("no answer"), "no answer", others=0, hopeless=False, now=9.0)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("up", "code"), [(True, 1), (False, 2)])
def test_an_error_of_the_pool_is_one_of_the_build_once_an_encoder_was_up(tmp_path, monkeypatch, up, code):
    workers = ScriptedPool(lambda shard, run: None)
    polls = [workers.poll] if up else []

    def poll(timeout_s):
        if polls:
            return polls.pop()(timeout_s)
        raise ConfigError("model.device: no CUDA device")

    monkeypatch.setattr(workers, "poll", poll)
    build, _, _ = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), workers)
    with pytest.raises((BuildError, ConfigError), match=r"no CUDA device") as caught:
        build.run()
    assert caught.value.exit_code == code


@pytest.mark.parametrize("outcome", [{"pid": 1}, AccessError("the hub did not answer")])
def test_repeated_load_returns_the_first_answer(monkeypatch, outcome):
    monkeypatch.setattr(actors, "DeathRecord", lambda: None)
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


def test_encoder_whose_decoders_do_not_start_fails_at_once(monkeypatch):
    monkeypatch.setattr(actors, "DeathRecord", lambda: None)
    actor = EncoderActor.__ray_actor_class__(None, 1, None)
    actor._loop = object.__new__(EncodeLoop)
    actor._loop._feed = SimpleNamespace(failure=FATAL[2], ready_lanes=0)
    with pytest.raises(BuildError, match="6 decoder processes"):
        actor._await_decoder()

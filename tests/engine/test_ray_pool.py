"""What `RayPool` does about encoders that are lost, hang or must leave, and about a head that is away. Without Ray."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from pipeline.engine.ray import cluster_watch
from pipeline.engine.ray import pool as ray_pool
from pipeline.engine.ray.cluster_watch import ClusterWatch
from pipeline.engine.ray.encoder_state import Call, EncoderState
from pipeline.engine.worker.death_record import Death
from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import NodeAvoided, Notice, ShardEnded, WorkerDraining, WorkerGone, WorkerUp
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.engine.worker.worker_stats import WorkerStats
from pipeline.errors import BuildError, CheckpointDiffers, HandedBack, WorkerLost
from pipeline.records import Counts, Shard, SourceObject, Timings
from tests.engine.scripted_actors import STEP, Calls, add, answer, place, pool  # noqa: F401 - a fixture

SHARD = Shard("tar", "x.tar", (SourceObject("x.tar", 100, "e"),))
NO_MORE = WorkerDraining("encoder-2", float("inf"))
CUDA = RuntimeError("CUDA error: an illegal memory access was encountered")


def died():
    error = ActorDiedError()
    error.error_msg = "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
    return error


@pytest.fixture
def up(pool, monkeypatch):  # noqa: F811
    """Both encoders are up, the second on another machine than the driver. `tasks`: answers that nodes owe."""
    place(pool, "encoder-1", "node-1")
    place(pool, "encoder-2", "node-2")
    assert answer(pool, "encoder-1", "load", {}) == [WorkerUp("encoder-1", "node-1")]
    assert answer(pool, "encoder-2", "load", {}) == [WorkerUp("encoder-2", "node-2")]
    pool.tasks = []

    def remote(path):
        pool.tasks.append(Future())
        return SimpleNamespace(future=lambda: pool.tasks[-1])

    monkeypatch.setattr(ray_pool, "_take_death", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote)))
    monkeypatch.setattr(ray_pool, "NodeAffinitySchedulingStrategy", lambda node, soft: (node, soft))
    pool._context.fingerprint = "f" * 32
    return pool


def checked(pool):  # noqa: F811
    """The events of one check of all encoders."""
    pool._wanted = 0  # none is created
    pool._watch_at = 0.0
    return pool.poll(0.0)


def test_lost_encoder_on_the_drivers_machine_is_reported_with_its_stage_and_video(up):
    up.assign("encoder-1", SHARD)
    (event,) = answer(up, "encoder-1", "run_shard", died())
    assert isinstance(event, WorkerGone)
    assert "encoder-1 lost: its process was killed from outside" in str(event.error)
    assert "in stage 'encode' of a of x.tar" in str(event.error)
    assert (event.cause, event.step) == ("killed", ())


def test_lost_encoder_elsewhere_is_reported_once_its_node_has_read_its_record(up):
    up.assign("encoder-2", SHARD)
    assert answer(up, "encoder-2", "run_shard", died()) == [NO_MORE]
    up.assign("encoder-2", SHARD)  # on its way already: nothing may be lost or counted
    (early,) = up.poll(0.0)
    assert isinstance(early, ShardEnded)
    assert isinstance(early.outcome, ShardFailure)
    assert isinstance(early.outcome.error, HandedBack)
    up.tasks[0].set_result(Death("segmentation fault (SIGSEGV)", "encode", STEP))
    (event,) = up.poll(1.0)
    assert "crashed: segmentation fault (SIGSEGV), in stage 'encode' of a of x.tar" in str(event.error)
    assert (event.cause, event.step) == ("unexplained", STEP)


def test_a_record_that_cannot_be_read_delays_the_report_only(up):
    up.assign("encoder-2", SHARD)
    assert answer(up, "encoder-2", "run_shard", died()) == [NO_MORE]
    assert checked(up) == []
    up._attended += ray_pool.RECORD_S + 1
    (event,) = checked(up)
    assert "encoder-2 lost: its process was killed or crashed" in str(event.error)
    assert event.step == ()


def test_error_of_the_device_replaces_the_encoder_and_the_second_of_one_gpu_avoids_the_node(up):
    add(up, "encoder-3", "node-1")
    for name in ("encoder-1", "encoder-3"):
        up.assign(name, SHARD)
        (event,) = answer(up, name, "run_shard", CUDA)
        assert "its device failed: CUDA error: an illegal memory access" in str(event.error)
        assert event.step == STEP
    (avoided,) = checked(up)
    assert isinstance(avoided, NodeAvoided)
    assert (avoided.node, "GPU 0 failed 2 times" in avoided.text) == ("node-1", True)


def test_encoders_that_all_end_by_their_own_work_stop_the_build_unless_a_shard_is_finished(up):
    up._losses = ray_pool.LOSSES - 1
    up.assign("encoder-2", SHARD)
    done = ShardResult(SHARD.id("f" * 32), True, Counts(), Counts(), Timings(), 1, {}, 1)
    answer(up, "encoder-2", "run_shard", done)
    assert up._losses == 0
    up._losses = ray_pool.LOSSES - 1
    up.assign("encoder-1", SHARD)
    with pytest.raises(BuildError, match=r"12 encoders in a row ended by their own work.*CUDA error.*resumes"):
        answer(up, "encoder-1", "run_shard", CUDA)


def test_a_load_without_progress_is_ended_with_its_stage_and_one_that_moves_is_not(pool):  # noqa: F811
    place(pool, "encoder-1", "node-1")  # "encoder-2" waits for a node
    pool._waiting_shown = True
    for progress in (1, 2):
        pool._attended += ray_pool.LOAD_S - 1
        pool._pulses[0] = (0.0, "encoder-1")
        pool.poll(0.0)
        assert answer(pool, "encoder-1", "stats", WorkerStats(progress=progress)) == []
    assert not [event for event in checked(pool) if isinstance(event, WorkerGone)]
    pool._attended += ray_pool.LOAD_S + 1
    (event,) = [event for event in checked(pool) if isinstance(event, WorkerGone)]
    assert "encoder-1 did not come up: no progress in loading for 300 s, in stage 'encode'" in str(event.error)
    assert pool._workers["encoder-2"].place is None


def test_checkpoint_that_differs_on_one_node_avoids_that_node(pool):  # noqa: F811
    place(pool, "encoder-1", "node-1")
    place(pool, "encoder-2", "node-2")
    (event,) = answer(pool, "encoder-1", "load", CheckpointDiffers("another network, on gpu-7"))
    assert "did not come up: another network, on gpu-7" in str(event.error)
    (avoided,) = [event for event in checked(pool) if isinstance(event, NodeAvoided)]
    assert "another network" in avoided.text
    pool._home = "node-2"
    with pytest.raises(BuildError, match="no encoder can start on any node"):
        answer(pool, "encoder-2", "load", CheckpointDiffers("another network, on gpu-8"))


def test_encoder_that_ends_before_it_has_said_where_it_is_is_created_anew(pool):  # noqa: F811
    """As when its node dies during the start. Only an actor that cannot be created ends the build at once."""
    for name in list(pool._workers):
        (event,) = answer(pool, name, "where", ActorDiedError())
        assert "the next one is created in" in str(event.error)
    pool._workers["encoder-3"] = EncoderState("encoder-3", Calls(), 0.0)
    pool._ask(Call("encoder-3", "where"))
    failed = ActorDiedError()
    failed._actor_init_failed = True
    with pytest.raises(BuildError, match="no encoder can start on any node"):
        answer(pool, "encoder-3", "where", failed)


def test_encoder_that_waits_for_a_node_is_created_anew_when_a_node_is_avoided_or_no_longer(pool, monkeypatch):  # noqa: F811
    created = []
    monkeypatch.setattr(pool, "_create", lambda: created.append(pool._avoided()))
    for _ in range(3):
        pool._health.failed("node-1", "x", time.monotonic())
    pool._watch_at = 0.0
    pool.poll(0.0)
    assert created == [("node-1",)] * 2
    assert pool._workers == {}


def test_nodes_that_are_avoided_are_used_again_where_no_other_has_room(pool):  # noqa: F811
    for _ in range(3):
        pool._health.failed("node-1", "x", time.monotonic())
    pool._waiting_shown = True
    pool._attended += ray_pool.PLACEMENT_S + 1
    (notice,) = checked(pool)
    assert "those that are avoided (1): they are used again" in notice.text
    assert pool._avoided() == ()


def test_drained_encoder_takes_no_shard_hands_back_and_leaves(up):
    up.assign("encoder-2", SHARD)
    up._watch.draining = {"node-2": time.time() + 40}
    notice, draining = checked(up)
    assert isinstance(notice, Notice)
    assert "encoder-2: its node host of node-2 goes away in" in notice.text
    assert isinstance(draining, WorkerDraining)
    assert 30 < draining.left_s <= 40
    assert checked(up) == []
    up._attended += ray_pool.DRAIN_S + 1
    assert [type(event) for event in checked(up)] == [WorkerDraining]
    up.hand_back("encoder-2", ["id"])
    assert "hand_back" in up._workers["encoder-2"].actor.asked
    failure = ShardFailure("id", HandedBack("handed back"))
    assert answer(up, "encoder-2", "run_shard", failure) == [ShardEnded("encoder-2", failure)]
    assert checked(up) == []
    (event,) = answer(up, "encoder-2", "shutdown", None)
    assert isinstance(event, WorkerGone)
    assert event.cause == "preempted"
    assert list(up._workers) == ["encoder-1"]
    assert up._health.avoided(lambda: {"node-1", "node-2"}, time.monotonic()) is None


def test_drained_encoder_without_shards_is_given_none_and_leaves(up):
    up._watch.draining = {"node-2": float("inf")}
    notice, draining = checked(up)
    assert "goes away at an unknown time; it finishes its shards" in notice.text
    assert isinstance(draining, WorkerDraining)
    assert checked(up) == []
    (event,) = answer(up, "encoder-2", "shutdown", None)
    assert (event.worker, event.cause) == ("encoder-2", "preempted")


def test_drained_encoder_is_replaced_before_it_has_left(up, monkeypatch):
    created = []
    monkeypatch.setattr(up, "_create", lambda: created.append(True))
    up.assign("encoder-2", SHARD)
    up._watch.draining = {"node-2": float("inf")}
    up._watch_at = 0.0
    up.poll(0.0)
    assert created == [True]


def test_head_that_does_not_answer_stops_the_build_without_waiting_for_it(up, monkeypatch):
    abandoned = []
    monkeypatch.setattr(ray_pool.session, "abandon", lambda: abandoned.append(True))
    up._watch.silent_s, up._watch.failure = lambda now: ray_pool.HEAD_S + 1, "RpcError: 14"
    with pytest.raises(BuildError, match=r"has not answered for 30 s, or was started anew \(RpcError: 14\).*resumes"):
        checked(up)
    up.close()
    assert abandoned == [True]
    assert not any("shutdown" in worker.actor.asked for worker in up._workers.values())


def test_watch_counts_silence_from_the_last_answer_and_survives_errors_of_ray():
    answers = [({"a"}, {"a": 5.0}), ConnectionError("rpc error")]
    asked = []

    def ask():
        asked.append(True)
        found = answers[min(len(asked), 2) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    watch = ClusterWatch(ask, period_s=0.001)
    while len(asked) < 5:
        time.sleep(0.001)
    assert watch.silent_s(3.0) == 0.0
    assert watch.silent_s(10.0) == 7.0
    assert (watch.alive, watch.draining) == ({"a"}, {"a": 5.0})
    assert watch.failure == "ConnectionError: rpc error"
    watch.close()


def test_head_that_does_not_know_the_drivers_node_was_started_anew(monkeypatch):
    found = [
        {"NodeID": "home", "Alive": True, "Resources": {"CPU": 1.0}},
        {"NodeID": "large", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"NodeID": "dead", "Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}},
    ]
    monkeypatch.setattr(cluster_watch.ray, "nodes", lambda: found)
    monkeypatch.setattr(cluster_watch.ray_state, "get_draining_nodes", lambda: {"large": 5000, "home": 0})
    assert cluster_watch.ask_head("home", 2.0, 0) == ({"large"}, {"large": 5.0, "home": float("inf")})
    with pytest.raises(ConnectionError, match="knows 2 live nodes, and not the driver's, gone"):
        cluster_watch.ask_head("gone", 2.0, 0)


def test_worker_lost_of_a_hang_blames_the_video_of_its_step(up):
    up.assign("encoder-1", SHARD)
    up._attended += 601
    events = [event for event in checked(up) if isinstance(event, WorkerGone)]
    assert [(event.step, isinstance(event.error, WorkerLost)) for event in events] == [(STEP, True)]

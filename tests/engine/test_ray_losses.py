"""Why an encoder was lost and whether its own work ended it; nodes on which encoders fail; failed starts."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError

from pipeline.engine.driver.dispatch import Dispatcher
from pipeline.engine.ray.losses import LINE, LOAD_FAILURES, LoadFailures, describe_loss, judge_loss
from pipeline.engine.ray.node_health import AVOIDED_S, FAILURES, NodeHealth
from pipeline.engine.worker.blamed_video import BlamedVideo, StepVideo
from pipeline.engine.worker.death_record import Death
from pipeline.errors import BuildError, CheckpointError, StorageUnavailable, WorkerLost


def died(text):
    error = ActorDiedError()
    error.error_msg = text
    return error


KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: EncoderActor
\tactor_id: 214d5e1a1bb9bdebdda015f501000000
\tpid: 6648
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits \
with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory \
usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."""
MEMORY = (
    "Task was killed due to the node running low on memory.\nMemory on the node was 7.1GB / 7.4GB (0.95)\n" + "x\n" * 40
)


@pytest.mark.parametrize(
    ("error", "part", "cause"),
    [
        (died(KILLED), "its process was killed or crashed", "unexplained"),
        (died("The actor died because its node has died. Node Id: 0123. It was terminated."), "its node died", "node"),
        (NodeDiedError("gone"), "its node died", "node"),
        (RayActorError(preempted=True), "preempted", "preempted"),
        (OutOfMemoryError(MEMORY), "low on memory", "killed"),
        (died(MEMORY), "low on memory", "killed"),
        (ActorUnavailableError("rpc error: 14", None), "no connection", "unexplained"),
        (WorkerLost("no progress for 4 s (engine.hang_s)"), "no progress for 4 s", "unexplained"),
        (
            RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"),
            "RuntimeError",
            "unexplained",
        ),
    ],
)
def test_a_loss_is_one_line_without_rays_hints(error, part, cause):
    line, blamed = describe_loss(error)
    assert part in line
    assert blamed == cause
    assert "\n" not in line
    assert len(line) <= LINE
    for hint in ("may or may not", "Some common causes", "GB /"):
        assert hint not in line


STEP = (StepVideo("shard", "s3://b/x.tar", "a"), StepVideo("shard", "s3://b/x.tar", "b"))
CUDA = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize(
    ("error", "death", "parts", "cause", "blame"),
    [
        # A crash in native code, by its record; the step names the videos.
        (
            died(KILLED),
            Death("segmentation fault (SIGSEGV)", "encode", STEP),
            ("crashed: segmentation fault (SIGSEGV)", "'encode' of a of s3://b/x.tar and 1 more"),
            "unexplained",
            True,
        ),
        # The kernel's memory killer: the cgroup counts one more.
        (
            died(KILLED),
            Death(None, "encode", STEP[:1], 1, "/sys/fs/cgroup/memory.events"),
            ("memory killer", "memory.events counts 1 more", "'encode' of a of", "more memory"),
            "killed",
            False,
        ),
        (died(KILLED), Death(None, "waiting for frames"), ("killed from outside", "'waiting for"), "killed", False),
        (died(MEMORY), Death(None, "encode", STEP), ("low on memory", "'encode' of a"), "killed", False),
        # Without a record (its node is gone as well) only Ray's words are left.
        (died(KILLED), None, ("killed or crashed",), "unexplained", False),
        (NodeDiedError("gone"), Death("aborted (SIGABRT)"), ("its node died",), "node", False),
        (died("Worker exit detail: Worker exits with an exit code 3."), Death(), ("exit code 3",), "unexplained", True),
        (
            CUDA,
            Death(None, "encode", STEP),
            ("device failed: CUDA error: an illegal", "'encode' of a"),
            "unexplained",
            True,
        ),
        (ValueError("a fault of ours"), Death(None, "encode", STEP), ("ValueError", "of a of"), "unexplained", True),
        (WorkerLost("no progress for 9 s", blame=True), Death(None, "encode", STEP), ("9 s, in",), "unexplained", True),
        (WorkerLost("no decoder actor could be placed"), None, ("placed",), "unexplained", False),
        (StorageUnavailable("away"), Death(None, "loading the network"), ("away",), "unexplained", False),
    ],
)
def test_cause_and_blame_of_a_lost_encoder(error, death, parts, cause, blame):
    loss = judge_loss(error, death)
    for part in parts:
        assert part in loss.line
    assert (loss.cause, loss.blame) == (cause, blame)
    assert loss.device == (error is CUDA)
    assert "\n" not in loss.line


def failed(failures, error=None, *, others=0, hopeless=False, now=0.0):
    error = error or WorkerLost("x")
    return failures.failed(error, str(error), others=others, hopeless=hopeless, now=now)


def test_failed_starts_stop_a_build_only_when_no_encoder_is_up():
    failures = LoadFailures(3600)
    for n in range(50):
        failed(failures, others=1, now=float(n))
    with pytest.raises(BuildError, match=r"no encoder is up.*last: x"):
        failed(failures, now=51.0)
    failures = LoadFailures(3600)
    for n in range(LOAD_FAILURES - 1):
        failed(failures, now=float(n))
    failures.succeeded()
    failed(failures, now=9.0)


def test_error_of_one_node_is_not_the_end_while_other_nodes_are_left():
    error = CheckpointError("w.ckpt: truncated")
    failures = LoadFailures(3600)
    assert "the next one is created in 1 s" in failed(failures, error)
    with pytest.raises(CheckpointError, match="truncated"):
        failed(failures, error, hopeless=True)
    failures.succeeded()
    with pytest.raises(BuildError, match=r"no encoder can start on any node.*truncated"):
        failed(failures, error, hopeless=True)
    failed(failures, error, hopeless=True, others=1)


def test_pauses_between_encoders_grow():
    failures = LoadFailures(3600)
    pauses = []
    for _ in range(6):
        failed(failures, others=1, now=100.0)
        pauses.append(failures.create_at - 100.0)
    assert pauses == sorted(pauses)
    assert pauses[0] <= 1
    assert pauses[-1] == 60


def test_unreachable_weights_are_waited_for_up_to_outage_s():
    failures = LoadFailures(100)
    for n in range(10):
        failed(failures, StorageUnavailable("away"), now=float(n * 10))
    with pytest.raises(BuildError, match=r"engine\.outage_s"):
        failed(failures, StorageUnavailable("away"), now=101.0)


def both():
    return {"sick" * 8, "well"}


SICK = "sick" * 8


def test_node_is_avoided_after_three_failures_for_a_time_and_never_all_nodes():
    health = NodeHealth()
    for n in range(FAILURES):
        assert health.avoided(both, float(n)) is None
        health.failed(SICK, f"reason {n}", float(n), host="gpu-7")
    assert health.avoided(both, 3.0) == [SICK]
    assert health.avoided(both, 4.0) == [SICK]
    ((node, text),) = health.newly_avoided()
    assert node == SICK
    assert "gpu-7 (sicksicksick) gets no encoder for 30 minutes: 3 encoders failed there, last: reason 2" in text
    assert health.avoided(lambda: {SICK}, 4.0) is None
    assert health.avoided(both, AVOIDED_S + 2.5) is None


def test_gpu_that_fails_twice_makes_its_node_avoided_and_two_gpus_once_each_do_not():
    health = NodeHealth()
    health.failed(SICK, "CUDA error", 0.0, gpu="3")
    health.failed(SICK, "CUDA error", 1.0, gpu="4")
    assert health.avoided(both, 2.0) is None
    health = NodeHealth()
    health.failed(SICK, "CUDA error", 0.0, gpu="3")
    health.failed(SICK, "CUDA error", 1.0, gpu="3")
    assert health.avoided(both, 2.0) == [SICK]
    assert "GPU 3 failed 2 times" in health.newly_avoided()[0][1]


def test_failures_that_a_rejected_video_explains_do_not_count_against_a_node():
    health = NodeHealth()
    step = (StepVideo("id0", "a.tar", "poison"), StepVideo("id0", "a.tar", "beside"))
    for n in range(FAILURES):
        health.failed(SICK, "its process crashed", float(n), step=step)
    poison = BlamedVideo("a.tar", "poison", 2, True, "x")
    health.excuse([poison])
    assert health.avoided(both, 3.0) == [SICK], "it ended no encoder elsewhere: it may be the node"
    health.failed("well", "its process crashed", 3.0, step=step[:1])
    health.excuse([BlamedVideo("a.tar", "beside", 1, False, "x")])
    assert health.avoided(both, 3.0) == [SICK]
    health.excuse([poison])
    assert health.avoided(both, 3.0) is None
    health.failed(SICK, "its process crashed", 4.0)
    assert health.avoided(both, 5.0) is None


def test_another_checkpoint_on_one_node_avoids_it_at_once_and_on_all_nodes_is_hopeless():
    health = NodeHealth()
    health.failed(SICK, "another checkpoint", 0.0, certain=True)
    assert health.avoided(both, 1.0) == [SICK]
    assert not health.all_certain(both, 1.0)
    assert not health.all_certain(set, 1.0)  # the nodes are not known yet
    health.failed("well", "another checkpoint", 1.0, certain=True)
    assert health.all_certain(both, 2.0)
    assert health.avoided(both, 2.0) is None


def test_loss_of_a_dead_node_is_excused_by_the_dispatcher():
    _, cause = describe_loss(NodeDiedError("gone"))
    assert Dispatcher([], credit=1, attempts=1).on_lost("unknown", WorkerLost("x"), 0.0, cause=cause) == []

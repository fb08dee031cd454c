"""Failed starts of encoders, and the text of an actor's loss."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError

from pipeline.engine.driver.dispatch import Dispatcher
from pipeline.engine.ray.losses import LEFT_OUT_S, LINE, LOAD_FAILURES, LoadFailures, describe_loss
from pipeline.errors import BuildError, StorageUnavailable, WorkerLost


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
        (OutOfMemoryError(MEMORY), "low on memory", "unexplained"),
        (died(MEMORY), "low on memory", "unexplained"),
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


def test_failed_starts_stop_a_build_only_when_no_encoder_is_up():
    failures = LoadFailures(3600)
    for n in range(50):
        failures.failed("a", WorkerLost("x"), "x", others=1, now=float(n))
    with pytest.raises(BuildError, match=r"no encoder is up.*last: x"):
        failures.failed("a", WorkerLost("x"), "x", others=0, now=51.0)
    failures = LoadFailures(3600)
    for n in range(LOAD_FAILURES - 1):
        failures.failed("a", WorkerLost("x"), "x", others=0, now=float(n))
    failures.succeeded()
    failures.failed("a", WorkerLost("x"), "x", others=0, now=9.0)


def test_pauses_between_encoders_grow():
    failures = LoadFailures(3600)
    pauses = []
    for _ in range(6):
        failures.failed("a", WorkerLost("x"), "x", others=1, now=100.0)
        pauses.append(failures.create_at - 100.0)
    assert pauses == sorted(pauses)
    assert pauses[0] <= 1
    assert pauses[-1] == 60


def test_unreachable_weights_are_waited_for_up_to_outage_s():
    failures = LoadFailures(100)
    for n in range(10):
        failures.failed("a", StorageUnavailable("away"), "away", others=0, now=float(n * 10))
    assert failures.excluded(lambda: {"a", "b"}, 100.0) is None  # no node's fault
    with pytest.raises(BuildError, match=r"engine\.outage_s"):
        failures.failed("a", StorageUnavailable("away"), "away", others=0, now=101.0)


def test_node_with_two_failed_starts_is_excluded_unless_it_is_the_only_one():
    failures = LoadFailures(3600)
    failures.failed("sick", WorkerLost("x"), "x", others=1, now=0.0)
    assert failures.excluded(lambda: {"sick", "well"}, 1.0) is None
    failures.failed("sick", WorkerLost("x"), "x", others=1, now=1.0)
    assert failures.excluded(lambda: {"sick", "well"}, 2.0) == ["sick"]
    assert failures.excluded(lambda: {"sick", "well"}, 3.0) == ["sick"]
    assert len(failures.notices()) == 1
    assert failures.excluded(lambda: {"sick"}, 3.0) is None
    assert failures.excluded(lambda: {"sick", "well"}, LEFT_OUT_S + 2.0) is None


def test_loss_of_a_dead_node_is_excused_by_the_dispatcher():
    _, cause = describe_loss(NodeDiedError("gone"))
    assert Dispatcher([], credit=1, attempts=1).on_lost("unknown", WorkerLost("x"), 0.0, cause=cause) == []

"""Decoder actors: why one died, and how a video is sent to another node. One process runs all cases; the tests check its results."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.config import StorageConfig
from pipeline.engine.ray import lanes as ray_lanes
from pipeline.errors import WorkerLost
from pipeline.records import Sample
from pipeline.storage import open_store
from tests.tiny_corpus import video_bytes, write_tar

pytestmark = [pytest.mark.ray, pytest.mark.s3]


@pytest.fixture(scope="module")
def results(ray_cluster, s3_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    video = video_bytes(29, 256, 256)
    assert len(video) > 4 * 64 * 1024  # more parts than are read at once
    (folder / "video.mp4").write_bytes(video)
    root = s3_server.with_fresh_bucket().root
    tar = write_tar(folder / "a.tar", {"x": {"txt": b"something before it"}, "a": {"mp4": video}})
    open_store(root, StorageConfig()).upload(tar, "a.tar")
    command = [
        sys.executable,
        "-m",
        "tests.engine.ray_lanes_process",
        ray_cluster.address,
        str(folder),
        f"{root}/a.tar",
    ]
    environment = {**ray_cluster.environment, **s3_server.environment()}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_video_sent_or_fetched_to_another_node_gives_the_same_pixels(results):
    assert results["at home"]["end"] == results["sent"]["end"] == results["fetched"]["end"] == "VideoEnded"
    assert results["at home"]["pixels"] == results["sent"]["pixels"] == results["fetched"]["pixels"] > 0
    assert [results[case]["receiving"] for case in ("at home", "sent", "fetched")] == [False, True, True]


@pytest.mark.parametrize("trouble", ["no way to the store", "fetched, replaced"])
def test_video_that_another_machine_cannot_fetch_is_sent_from_the_local_copy(results, trouble):
    assert results[trouble] == results["fetched"]


def test_video_that_cannot_be_sent_is_storage_unavailable(results):
    assert results["sent, no file"]["end"] == "StorageUnavailable"
    assert "/not here cannot be sent to a decoder on another node" in results["sent, no file"]["message"]


def test_paired_videos_go_along_to_another_node(results):
    assert results["sent, paired"]["end"] == "VideoEnded"
    assert results["sent, paired"]["pixels"] == 2 * results["sent"]["pixels"]
    assert results["sent, no member"]["end"] == "StorageUnavailable"
    assert "/not here cannot be sent to a decoder on another node" in results["sent, no member"]["message"]


@pytest.mark.parametrize("where", ["", " elsewhere"])
def test_crash_of_an_actor_is_distinguished_from_a_kill(results, where):
    crash, kill = results[f"crash{where}"], results[f"kill{where}"]
    assert (crash["end"], crash["blame"]) == (kill["end"], not kill["blame"]) == ("WorkerLost", True)
    assert crash["message"] == "decoder process ended: segmentation fault (SIGSEGV)"
    assert "killed from outside" in kill["message"]


def test_full_object_store_is_a_loss_of_the_lane(results):
    assert (results["store full"]["end"], results["store full"]["blame"]) == ("WorkerLost", False)
    assert "ObjectStoreFullError" in results["store full"]["message"]


def test_a_closed_set_of_lanes_starts_no_actor(results):
    assert results["after close"] == [0]


def test_rays_error_decides_the_blame_of_a_loss():
    from ray import exceptions

    def died(text, **more):
        error = exceptions.ActorDiedError()
        error.error_msg = text
        for name, value in more.items():
            setattr(error, name, value)
        return error

    cases = [
        (
            died("Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits with an exit code 3."),
            True,
            "exit code 3",
        ),
        (died("Worker exits with an exit code 1. The process receives a SIGTERM."), False, "SIGTERM"),
        (died("The actor is dead because its node has died."), False, "its node has died"),
        (died("The node was terminated", _preempted=True), False, "preempted"),
        (died("creation task, ImportError: av", _actor_init_failed=True), True, "could not start"),
        (exceptions.ActorUnavailableError("connection reset", None), False, "ActorUnavailableError"),
        (exceptions.OutOfMemoryError("Memory on the node was ...\n" * 40), False, "memory monitor"),
        (exceptions.NodeDiedError("gone"), False, "NodeDiedError"),
        (exceptions.LocalRayletDiedError(), False, "raylet died"),
        (exceptions.WorkerCrashedError(), False, "WorkerCrashedError"),
        (exceptions.RayTaskError("pull", "trace", ValueError("a fault of ours")), True, "ValueError"),
        (
            exceptions.RayTaskError("pull", "trace", exceptions.ObjectStoreFullError("full")),
            False,
            "ObjectStoreFullError",
        ),
    ]
    for error, blame, results in cases:
        lost = ray_lanes._lost(error)
        assert (type(lost), lost.blame) == (WorkerLost, blame), lost
        assert results in lost.message
        assert "\n" not in lost.message
        assert len(lost.message) < 300


def test_reading_is_true_while_an_actor_on_this_node_reads_its_file(results):
    assert results["in a read"] == [False, True, False]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_machine_without_memory_or_threads_is_lost_without_blame(monkeypatch, error):
    def fail(*arguments):
        raise error

    actor = ray_lanes.DecoderActor.__ray_metadata__.modified_class.__new__(
        ray_lanes.DecoderActor.__ray_metadata__.modified_class
    )
    actor._worker = SimpleNamespace(close=lambda: None)
    actor._arrival = SimpleNamespace(fetch=fail, append=fail)
    sample = Sample("k", 0, "s3://b/k.tar", b"", "mp4", span=(0, 1))
    for lost in (actor.fetch(sample, "etag", StorageConfig()), actor.append(b"piece", True)):
        assert isinstance(lost, WorkerLost)
        assert not lost.blame

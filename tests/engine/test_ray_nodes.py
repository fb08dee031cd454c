"""Nodes of a cluster: one has a damaged checkpoint, one dies, one is drained with a deadline. They join the suite's head.

Encoders need more CPUs than the head has, so they run on these nodes only.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.storage import open_store
from pipeline.storage.checkpoints import fetch
from tests.engine.test_inline import assert_same_rows
from tests.tiny_corpus import TINY_NETWORK, make_corpus, receipts, rows, tiny_flags, tiny_job

pytestmark = [pytest.mark.ray, pytest.mark.s3]

SHARDS = 4
JOINED = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
while not any(info.labels.get("name") == sys.argv[2] and info.state == 0 for info in client.get_all_node_info().values()):
    time.sleep(0.2)
"""
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
client = GcsClient(address=sys.argv[1])
(node,) = [key for key, info in client.get_all_node_info().items() if info.labels.get("name") == sys.argv[2] and info.state == 0]
deadline = time.time_ns() // 1_000_000 + int(sys.argv[3]) * 1000
print(client.drain_node(node.hex(), DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline))
"""


class Node:
    """A raylet that joins the head, with a label by which it is found."""

    def __init__(self, cluster, name, **environment):
        self.name = name
        ray = str(Path(sys.executable).with_name("ray"))
        join = [ray, "start", f"--address={cluster.address}", "--num-cpus=8", "--num-gpus=0", f"--labels=name={name}"]
        self._process = subprocess.Popen(
            [
                *join,
                "--block",
                "--disable-usage-stats",
                "--include-log-monitor=false",
                "--object-store-memory=100000000",
            ],
            env={**cluster.environment, **environment, "RAY_START_HOOK": "tests.engine.ray_head.prepare"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def processes(self, name):
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self._process.pid).children(recursive=True)
            return [process for process in found if name in (process.cmdline() or [""])[0]]
        return []

    def wait(self, cluster):
        """Until Ray's head knows the node."""
        command = [sys.executable, "-c", JOINED, cluster.address, self.name]
        subprocess.run(command, env=cluster.environment, check=True, timeout=240)

    def kill_raylet(self):
        self.processes("raylet")[0].kill()
        self._process.wait(240)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(240)


def wait_for(condition, run):
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def environment(ray_cluster, s3_server):
    """Of drivers and nodes: they find the S3 server."""
    return {**ray_cluster.environment, **s3_server.environment()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=SHARDS, samples=2)


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    pipeline.encode(tiny_job(corpus, output))
    return rows(output)


@pytest.fixture(scope="module")
def checkpoint(s3_server, tmp_path_factory):
    """URI of the tiny network's weights, and a cache folder whose copy of them is damaged."""
    from safetensors.torch import save_file

    from model.leanvae.random_weights import random_weights
    from model.registry import complete

    folder = tmp_path_factory.mktemp("weights")
    weights = {name: value.contiguous() for name, value in random_weights(complete("leanvae", TINY_NETWORK), 5).items()}
    save_file(weights, folder / "w.safetensors", metadata={"config": json.dumps(TINY_NETWORK)})
    root = s3_server.with_fresh_bucket().root
    open_store(root, StorageConfig()).upload(folder / "w.safetensors", "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATHE_CACHE", str(folder / "damaged"))
        copy = Path(fetch(f"{root}/w.safetensors"))
    damaged = bytearray(copy.read_bytes())
    for place in range(len(damaged) // 4, len(damaged), 97):  # in the encoder's tensors, too: only they count
        damaged[place] ^= 1
    copy.write_bytes(damaged)
    return f"{root}/w.safetensors", folder


@pytest.fixture(scope="module")
def nodes(ray_cluster, environment, checkpoint):
    """The node with the damaged checkpoint; `start` adds others."""
    made = {}

    def start(name):
        caches = {"first": "damaged"}
        cache = str(checkpoint[1] / caches.get(name, "sound"))
        # One after another: nodes of one machine that start at the same time may choose the same ports.
        made[name] = Node(ray_cluster, name, **environment, LATHE_CACHE=cache)
        made[name].wait(ray_cluster)

    start("first")
    yield start, made
    for node in made.values():
        node.close()


def patient():
    """In the driver, before it begins: the node of a lost encoder may be slow, and no shard is done before a deadline."""
    from pipeline.engine.driver import draining
    from pipeline.engine.ray import pool

    pool.RECORD_S, draining.MARGIN_S = 240.0, 1e6


def encode(cluster, environment, corpus, output, *settings):
    wanted = ("encoders=1", "encoder_cpus=5", "decoders=1", "decoder_cpus=0.5", "credit=1", "attempts=1")
    texts = [*(f"engine.{text}" for text in wanted), *settings]
    flags = [part for text in texts for part in ("--set", text)]
    joined = ("--executor", "ray", "--address", cluster.address)
    cluster.environment, before = environment, cluster.environment
    try:
        prepare = "tests.engine.test_ray_nodes:patient"
        return cluster.start("encode", corpus, output, *tiny_flags(*joined, *flags), prepare=prepare)
    finally:
        cluster.environment = before


def encoder_node(made, run):
    """The node that runs the build's encoder."""
    return wait_for(lambda: next((node for node in made.values() if node.processes("ray::EncoderActor")), None), run)


def test_node_with_a_damaged_checkpoint_is_named_and_a_crash_on_another_node_is_told_by_its_record(
    ray_cluster, environment, corpus, nodes, checkpoint, tmp_path
):
    start, _ = nodes
    start("second")
    weights = (f"model.checkpoint={checkpoint[0]}", "model.untrained=null", "model.config=null")
    crash = ("drill.point=mid_video", "drill.action=crash", f"drill.marker_dir={tmp_path / 'm'}")
    here = {**environment, "LATHE_CACHE": str(checkpoint[1] / "driver")}
    # One encoder on each node: a node has no room for two.
    settings = (*weights, *crash, "engine.encoders=2", "engine.attempts=2")
    run = encode(ray_cluster, here, corpus, tmp_path / "out", *settings)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert "did not come up: the checkpoint on " in stderr, stderr
    assert "is damaged or old, or was replaced since the build began: latent_weights_sha256 is " in stderr
    assert "gets no encoder for 30 minutes: the checkpoint on " in stderr
    assert re.search(
        r"process crashed: segmentation fault \(SIGSEGV\), in stage 'encode' of \d{6} of .*\.tar", stderr
    ), stderr
    assert len(receipts(tmp_path / "out")) == SHARDS


def test_a_node_that_dies_counts_against_no_shard(ray_cluster, environment, corpus, clean, nodes, tmp_path):
    output, (_, made) = tmp_path / "out", nodes
    drill = ("drill.point=after_commit", "drill.action=hang", f"drill.marker_dir={tmp_path / 'm'}")
    run = encode(ray_cluster, environment, corpus, output, *drill)
    wait_for((tmp_path / "m").exists, run)
    node = encoder_node(made, run)
    node.kill_raylet()
    del made[node.name]
    node.close()
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert "its node died" in stderr, stderr
    assert "attempt 1 of" not in stderr
    assert_same_rows(clean, rows(output))


def test_drained_node_hands_its_shards_back_before_its_deadline(
    ray_cluster, environment, corpus, clean, nodes, tmp_path
):
    start, made = nodes
    start("third")
    # The first attempt never ends by itself.
    drill = ("drill.point=after_fetch", "drill.action=hang", f"drill.marker_dir={tmp_path / 'm'}")
    run = encode(ray_cluster, environment, corpus, tmp_path / "out", *drill)
    wait_for((tmp_path / "m").exists, run)
    node = encoder_node(made, run)
    command = [sys.executable, "-c", DRAIN, ray_cluster.address, node.name, "299"]
    drained = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "True" in drained.stdout, drained.stderr
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert "goes away in 2" in stderr, stderr
    assert "handed back: its node goes away" in stderr, stderr
    assert "encoder-1 left its node" in stderr, stderr
    assert "lost" not in stderr, stderr
    assert_same_rows(clean, rows(tmp_path / "out"))

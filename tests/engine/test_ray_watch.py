"""Encoders that do not start; a driver that was stopped."""

import signal
import time

import pytest

from tests.tiny_corpus import make_corpus, receipts, tiny_flags

pytestmark = pytest.mark.ray

SHARDS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=SHARDS, samples=2)


def wait_for(condition, alive=lambda: True):
    deadline = time.monotonic() + 240
    while not condition():
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def flags_of(cluster, *more):
    """One decoder to an encoder, and one shard after another."""
    few = ("--set", "engine.decoder_cpus=0.5", "--set", "engine.decoders=1", "--set", "engine.credit=1")
    return tiny_flags("--executor", "ray", "--address", cluster.address, *few, *more)


def test_failed_replacements_do_not_stop_a_working_encoder(ray_cluster, corpus, tmp_path):
    """The first encoder is stopped while the second is killed three times during its start."""
    output = tmp_path / "out"
    seen = {process.pid for process in ray_cluster.encoders()}
    run = ray_cluster.start("encode", corpus, output, *flags_of(ray_cluster, "--set", "engine.encoders=2"))

    def alive():
        return run.poll() is None

    def new():
        return [process for process in ray_cluster.encoders() if process.pid not in seen]

    wait_for(lambda: len(new()) == 2, alive)
    first = new()[0]
    seen.add(first.pid)
    held = []

    def others():
        if not held and (output / "_receipts").exists():
            first.suspend()  # so that the build is not over before three have failed
            held.append(True)
        return new()

    for _ in range(3):
        wait_for(others, alive)
        victim = others()[0]
        seen.add(victim.pid)
        victim.kill()
    first.resume()
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert stderr.count("did not come up") == 3
    assert "encoder-1 lost" not in stderr
    assert f"{SHARDS} of {SHARDS} shards encoded" in stdout
    assert max(len(line) for line in stderr.splitlines() if line.startswith("lathe:")) < 400


def test_driver_that_was_stopped_kills_no_working_encoder(ray_cluster, corpus, tmp_path):
    """As when a laptop sleeps: driver and encoder stand still for longer than hang_s, and go on."""
    output = tmp_path / "out"
    before = {process.pid for process in ray_cluster.encoders()}
    run = ray_cluster.start("encode", corpus, output, *flags_of(ray_cluster, "--set", "engine.hang_s=4"))
    wait_for((output / "_receipts").exists, lambda: run.poll() is None)
    mine = [process for process in ray_cluster.encoders() if process.pid not in before]
    for process in mine:
        process.suspend()
    time.sleep(1)
    run.send_signal(signal.SIGSTOP)
    time.sleep(6)
    run.send_signal(signal.SIGCONT)
    for process in mine:
        process.resume()
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert "lost" not in stderr
    assert len(receipts(output)) == SHARDS

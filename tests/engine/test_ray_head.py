"""The head of a private Ray is killed in the middle of a build: it ends soon, says how to go on, and leaves no process."""

import contextlib
import os
import time

import psutil
import pytest

from tests import forked_command
from tests.tiny_corpus import make_corpus, receipts, tiny_flags

pytestmark = pytest.mark.ray


def impatient():
    """In the driver, before it begins."""
    from pipeline.engine.ray import cluster_watch, pool

    pool.HEAD_S, cluster_watch.PERIOD_S = 6.0, 0.5


def test_build_without_a_head_ends_and_the_same_command_resumes(tmp_path):
    corpus, output = make_corpus(tmp_path / "corpus", shards=3, samples=2), tmp_path / "out"
    drill = ("drill.point=after_commit", "drill.action=hang", f"drill.marker_dir={tmp_path / 'm'}", "engine.credit=1")
    hang = [part for text in drill for part in ("--set", text)]
    # Raylets end by themselves when their head has been away for so long, by default a minute.
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    prepare = "tests.engine.test_ray_head:impatient"
    run = forked_command.start("encode", corpus, output, *tiny_flags(*hang), prepare=prepare, env=environment)
    deadline = time.monotonic() + 240
    while not (tmp_path / "m").exists():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    heads = [process for process in family if process.name() == "gcs_server"]
    assert len(heads) == 1
    heads[0].kill()
    _, stderr = run.communicate(timeout=240)
    assert run.returncode == 1, stderr
    assert "the head of the Ray cluster has not answered for 6 s" in stderr
    assert "the same command resumes" in stderr
    assert len(receipts(output)) == 1
    # Ray's own agent reports the raylet's end to the head that is gone, for a minute (a constant), and ends then.
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::RuntimeEnvAgent" in process.cmdline():
                process.kill()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert alive == []
    again = forked_command.run("encode", corpus, output, *tiny_flags("--executor", "inline"))
    assert again.returncode == 0, again.stderr
    assert "1 were done before" in again.stdout

"""Builds on real Ray actors: equal rows, killed actors, a killed driver, a submitted job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import pipeline
from tests.engine.test_inline import assert_same_rows
from tests.engine.test_kill import assert_sound, drill_flags
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_flags, tiny_job, video_bytes, write_tar

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=3, samples=3)


@pytest.fixture(scope="module")
def clean_rows(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    pipeline.encode(tiny_job(corpus, output))
    return rows(output)


def joined(cluster):
    flags = ("--address", cluster.address, "--set", "engine.decoder_cpus=0.5", "--set", "engine.decoders=1")
    return tiny_flags("--executor", "ray", *flags)


def test_a_private_ray_gives_the_rows_of_the_inline_executor(corpus, clean_rows, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "pipeline", "encode", corpus, tmp_path / "out", *tiny_flags()]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert "9 in = 6 encoded + 3 rejected" in run.stdout
    assert_sound(tmp_path / "out", clean_rows, samples=9)


def test_several_encoders_share_the_shards(ray_cluster, corpus, clean_rows, tmp_path):
    more = ("--set", "engine.encoders=2", "--set", "engine.decoders=2")
    run = ray_cluster.lathe("encode", corpus, tmp_path / "out", *joined(ray_cluster), *more)
    assert run.returncode == 0, run.stderr
    assert_sound(tmp_path / "out", clean_rows, samples=9)


@pytest.mark.parametrize("point", ["mid_video", "after_commit", "in_decoder"])
def test_killed_actor_loses_and_doubles_no_row(ray_cluster, corpus, clean_rows, tmp_path, point):
    run = ray_cluster.lathe(
        "encode", corpus, tmp_path / "out", *joined(ray_cluster), *drill_flags(point, tmp_path / "m")
    )
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path / "m") == [f"{point}-0"]
    if point != "in_decoder":
        assert "encoder-1 lost: its process was killed from outside (no crash, no memory kill), in stage" in run.stderr
    assert_sound(tmp_path / "out", clean_rows, samples=9)


def test_hanging_encoder_is_replaced(ray_cluster, corpus, clean_rows, tmp_path):
    flags = [*drill_flags("mid_video", tmp_path / "m"), "--set", "drill.action=hang", "--set", "engine.hang_s=4"]
    run = ray_cluster.lathe("encode", corpus, tmp_path / "out", *joined(ray_cluster), *flags)
    assert run.returncode == 0, run.stderr
    assert "no progress for 4 s" in run.stderr
    assert_sound(tmp_path / "out", clean_rows, samples=9)


def test_actors_end_with_a_killed_driver_and_the_next_run_finishes(ray_cluster, clean_rows, corpus, tmp_path):
    output = tmp_path / "out"
    # The first commit hangs in its actor, so that there is a moment to kill the driver in.
    hang = [*drill_flags("after_commit", tmp_path / "m"), "--set", "drill.action=hang", "--set", "engine.credit=1"]
    driver = ray_cluster.start("encode", corpus, output, *joined(ray_cluster), *hang)
    deadline = time.monotonic() + 240
    while not (tmp_path / "m").exists():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    actors = ray_cluster.encoders()
    assert actors
    driver.kill()
    driver.communicate(timeout=300)
    assert len(receipts(output)) == 1
    deadline = time.monotonic() + 240
    while any(actor.is_running() and actor.status() != psutil.STATUS_ZOMBIE for actor in actors):
        assert time.monotonic() < deadline, "the encoder outlives its driver"
        time.sleep(0.2)
    again = ray_cluster.lathe("encode", corpus, output, *joined(ray_cluster))
    assert again.returncode == 0, again.stderr
    assert "1 were done before" in again.stdout
    assert_sound(output, clean_rows, samples=9)


def test_ray_job_submit_runs_the_working_folder(ray_cluster, corpus, clean_rows, tmp_path):
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--address", ray_cluster.job_server, "--working-dir", str(ROOT), "--"]
    entry = [
        sys.executable,
        "-m",
        "pipeline",
        "encode",
        str(corpus),
        str(tmp_path / "out"),
        *tiny_flags("--set", "engine.decoder_cpus=0.5", "--set", "engine.decoders=1"),
    ]
    environment = {k: v for k, v in ray_cluster.environment.items() if k != "PYTHONPATH"}
    deadline = time.monotonic() + 240
    while True:  # a head that has just come up has no agent for jobs yet
        run = subprocess.run([*submit, *entry], capture_output=True, text=True, timeout=300, env=environment)
        if "No available agent" not in run.stderr + run.stdout or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "succeeded" in run.stdout
    assert_sound(tmp_path / "out", clean_rows, samples=9)


def test_an_address_where_no_ray_answers_is_exit_code_2(corpus, tmp_path, ray_cluster):
    run = ray_cluster.lathe("encode", corpus, tmp_path / "out", *tiny_flags("--address", "127.0.0.1:1"))
    assert run.returncode == 2
    assert "engine.address" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_encoders_that_do_not_fit_on_a_real_cluster_are_refused_with_the_arithmetic(ray_cluster, corpus, tmp_path):
    """Whether a cluster grows is read by calls of Ray that are not public: without them every cluster would be waited for."""
    many = ("--set", "engine.encoders=3", "--set", "engine.encoder_cpus=2")
    run = ray_cluster.lathe("encode", corpus, tmp_path / "out", *joined(ray_cluster), *many)
    assert run.returncode == 2, run.stderr
    assert "3 encoders of 2 CPU and 3 decoders of 0.5 CPU need 7.5 CPU" in run.stderr, run.stderr
    assert receipts(tmp_path / "out") == []


def test_signals_reach_the_driver_not_the_actors(ray_cluster, corpus, clean_rows, tmp_path):
    output = tmp_path / "out"
    driver = ray_cluster.start("encode", corpus, output, *joined(ray_cluster), "--set", "engine.credit=1")
    deadline = time.monotonic() + 240
    while not (output / "_receipts").exists():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, stderr = driver.communicate(timeout=300)
    if driver.returncode != 0:  # it was not done yet: drained, and says how to go on
        assert driver.returncode == 130
        assert "the same command resumes" in stderr
    again = ray_cluster.lathe("encode", corpus, output, *joined(ray_cluster))
    assert again.returncode == 0, again.stderr
    assert_same_rows(clean_rows, rows(output))


@pytest.fixture(scope="module")
def one_video(tmp_path_factory):
    """A shard of one video of six clips, so that every drill is met on it."""
    return write_tar(tmp_path_factory.mktemp("one") / "a.tar", {"a": {"mp4": video_bytes(31), "txt": b"x"}})


def test_a_decoder_actor_killed_twice_on_one_video_loses_no_clip(ray_cluster, one_video, tmp_path):
    flags = [*joined(ray_cluster), *drill_flags("in_decoder", tmp_path / "m", times=2)]
    run = ray_cluster.lathe("encode", one_video, tmp_path / "out", *flags)
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(tmp_path / "m")) == ["in_decoder-0", "in_decoder-1"]
    pipeline.encode(tiny_job(one_video, tmp_path / "clean"))
    assert len(rows(tmp_path / "out")) == 6
    assert_sound(tmp_path / "out", rows(tmp_path / "clean"), samples=1)


def test_a_video_that_crashes_its_decoder_actor_twice_is_rejected_with_the_signal_named(
    ray_cluster, one_video, tmp_path
):
    flags = [*joined(ray_cluster), *drill_flags("in_decoder", tmp_path / "m", times=2), "--set", "drill.action=crash"]
    run = ray_cluster.lathe("encode", one_video, tmp_path / "out", *flags)
    assert run.returncode == 1, run.stderr  # it was the only video
    (receipt,) = receipts(tmp_path / "out")
    (reject,) = receipt.rejects
    assert (reject.reason, reject.message) == (
        "decoder_crashed",
        "decoder process ended: segmentation fault (SIGSEGV), 2 times",
    )

"""One SIGINT, SIGTERM or SIGHUP at any moment of a command: exit code 130, one line, no process and no file left."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cli import progress
from pipeline.process import signals
from tests import forked_command
from tests.engine.test_kill import drill_flags
from tests.tiny_corpus import make_corpus, receipts, tiny_flags, video_bytes, write_tar

PRIVATE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=4, samples=2)


@pytest.fixture
def temporary():
    """A TMPDIR of the command's own, short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as folder:
        yield Path(folder)


def start(corpus, output, temporary, *flags, **options):
    environment = {**PRIVATE, "TMPDIR": str(temporary)}
    # `left_behind` finds fresh decoders by their environment.
    options["fresh_decoders"] = True
    flags = tiny_flags("--set", "engine.decoders=1", *flags)
    return forked_command.start("encode", corpus, output, *flags, env=environment, **options)


def wait_for(condition, run):
    deadline = time.monotonic() + 300
    while not condition():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def catches(run, number):
    """Whether the process has a handler for the signal."""
    mask = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{run.pid}/status").read_text())
    return bool(int(mask[1], 16) >> (number - 1) & 1)


def left_behind(temporary):
    """Processes that were started with this TMPDIR, and what lies in it."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(temporary) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(" ".join(process.cmdline())[:100])
        except psutil.Error:
            continue
    return processes, sorted(path.name for path in temporary.iterdir())


def assert_nothing_left(temporary):
    deadline = time.monotonic() + 120
    while left_behind(temporary) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_behind(temporary) == ([], [])


def assert_stopped(run, temporary):
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 130, stderr
    assert re.search(r"^lathe: stopped.*; the same command resumes$", stderr, re.M), stderr
    assert "Traceback" not in stderr
    assert_nothing_left(temporary)
    return stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_start_up_ends_the_command(corpus, tmp_path, temporary, number):
    """In a fresh interpreter, which has all its imports before it."""
    command = [sys.executable, "-m", "pipeline", "encode", str(corpus), str(tmp_path / "out")]
    run = subprocess.Popen(
        [*command, *tiny_flags("--executor", "inline")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**PRIVATE, "TMPDIR": str(temporary)},
    )
    wait_for(lambda: catches(run, signal.SIGHUP), run)
    run.send_signal(number)
    assert_stopped(run, temporary)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_while_encoding_drains(corpus, tmp_path, temporary, number):
    output = tmp_path / "out"
    flags = ("--executor", "inline", "--set", "engine.credit=1")
    run = start(corpus, output, temporary, *flags)
    wait_for(lambda: (output / "_receipts").exists(), run)
    run.send_signal(number)
    stderr = assert_stopped(run, temporary)
    done = len(receipts(output))
    assert 0 < done < 4
    assert f"stopped: {4 - done} shards to do" in stderr
    again = start(corpus, output, temporary, *flags)
    assert again.communicate(timeout=300)[1].count("error") == 0
    assert again.returncode == 0
    assert len(receipts(output)) == 4


def test_a_second_signal_stops_at_once(corpus, tmp_path, temporary):
    flags = ("--executor", "inline", *drill_flags("before_upload", tmp_path / "m"), "--set", "drill.action=hang")
    run = start(corpus, tmp_path / "out", temporary, *flags)
    wait_for(lambda: (tmp_path / "m").exists(), run)
    run.send_signal(signal.SIGTERM)
    assert any("stopping" in line for line in run.stderr)
    time.sleep(signals.BURST_S + 0.1)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 130, stderr
    # Shards before and beside the one that hangs may be done by then: a slow machine had two. The one that hangs is never.
    done = len(receipts(tmp_path / "out")) if (tmp_path / "out" / "_receipts").exists() else 0
    assert done < 4
    assert re.search(rf"stopped: {4 - done} shards? to do", stderr), stderr


@pytest.mark.parametrize("progress", ["plain", "rich", "json"])
def test_closed_terminal_does_not_stop_the_drain(corpus, tmp_path, temporary, progress):
    """SIGHUP comes more than once, with a terminal that can no longer be written to."""
    master, slave = os.openpty()
    output = tmp_path / "out"
    flags = ("--executor", "inline", "--set", "engine.credit=1", "--progress", progress)
    run = start(corpus, output, temporary, *flags, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    wait_for(lambda: (output / "_receipts").exists(), run)
    os.close(master)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # from the shell, the kernel, systemd
        run.send_signal(number)
        time.sleep(0.01)
    assert run.wait(300) == 130
    assert receipts(output)
    assert_nothing_left(temporary)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # Ray has a handler of its own for SIGTERM only
def test_a_signal_while_a_private_ray_starts(corpus, tmp_path, temporary, number):
    run = start(corpus, tmp_path / "out", temporary)
    wait_for(lambda: list(temporary.glob("lathe-ray-*/session_*")), run)
    run.send_signal(number)
    assert_stopped(run, temporary)


@pytest.mark.ray
def test_a_build_on_a_private_ray_that_fails_leaves_nothing_behind(corpus, tmp_path, temporary):
    drill = drill_flags("before_commit", tmp_path / "m", 99)
    run = start(
        corpus, tmp_path / "out", temporary, *drill, "--set", "drill.action=raise", "--set", "engine.attempts=1"
    )
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 1, stderr
    assert "4 of 4 shards failed" in stderr
    assert_nothing_left(temporary)


def test_a_library_call_installs_no_handlers():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with signals.deferred():
        assert [signal.getsignal(number) for number in signals.STOPPING] == before
    other = []
    thread = threading.Thread(target=lambda: other.append(signals.handled().__enter__()))
    thread.start()
    thread.join()
    assert other == [None]
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


def test_handlers_are_restored_and_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                assert signals.requested()
            with pytest.raises(KeyboardInterrupt):
                signals.check()
        assert not signals.requested()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_burst_of_signals_is_one_request_and_later_ones_are_more():
    with signals.handled(), signals.deferred():
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.requested()
        time.sleep(signals.BURST_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.ray
def test_a_signal_while_a_private_ray_encodes_drains_and_leaves_nothing_behind(tmp_path, temporary):
    """The shard that runs takes seconds: a handler of Ray that aborts the process would show meanwhile."""
    (tmp_path / "in").mkdir()
    videos = {f"{n:03d}": {"mp4": video_bytes(40, seed=n)} for n in range(40)}
    write_tar(tmp_path / "in" / "a.tar", videos)
    write_tar(tmp_path / "in" / "b.tar", dict(list(videos.items())[:1]))
    write_tar(tmp_path / "in" / "c.tar", dict(list(videos.items())[:2]))
    flags = ("--set", "engine.credit=1", "--set", "engine.encoders=1", "--set", "engine.decoders=1")
    run = start(tmp_path / "in", tmp_path / "out", temporary, *flags, "--progress", "json")
    assert any(json.loads(line).get("frames") for line in run.stdout)
    run.send_signal(signal.SIGTERM)
    assert_stopped(run, temporary)
    assert [receipt.counts.encoded for receipt in receipts(tmp_path / "out")] == [40]


def test_a_signal_while_the_checkpoint_is_fetched_ends_the_command(corpus, tmp_path, temporary):
    """The store takes the request and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = ["encode", corpus, tmp_path / "out", "--executor", "inline"]
        flags = ["--model", "leanvae-dim16", "--checkpoint", "s3://b/w.ckpt"]
        environment = {
            **PRIVATE,
            "TMPDIR": str(temporary),
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }
        run = forked_command.start(*command, *flags, env=environment)
        silent.settimeout(300)
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            run.send_signal(signal.SIGINT)
            assert_stopped(run, temporary)


@pytest.mark.parametrize("display", [progress.Json, progress.Plain])
def test_display_continues_without_its_terminal(monkeypatch, display):
    master, slave = os.openpty()
    os.close(master)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        display().notice("stopping")
        display().notice("stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_plan_that_is_stopped_leaves_neither_processes_nor_files(tmp_path, temporary, number):
    large = video_bytes(5) + bytes(2 << 20)  # more than storage.spool_bytes: it waits in a file
    write_tar(tmp_path / "a.tar", {f"k{n}": {"mp4": large} for n in range(4)})
    # Decoders sleep before they are up, so that the plan cannot end by itself, however slow this machine is.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, time\nif 'pipeline.engine.decoders.lane_process' in sys.orig_argv:\n    time.sleep(3600)\n"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = ["plan", tmp_path / "a.tar", "--set", "engine.decoders=2", "--set", f"storage.spool_bytes={1 << 20}"]
    environment = {**PRIVATE, "TMPDIR": str(temporary), "PYTHONPATH": paths}
    run = forked_command.start(*command, env=environment, fresh_decoders=True)
    plan = psutil.Process(run.pid)
    wait_for(lambda: len(plan.children()) == 2, run)
    wait_for(lambda: list(temporary.glob("lathe-scratch-*/*")), run)
    run.send_signal(number)
    assert run.communicate(timeout=300)[1] == "lathe: stopped; nothing was written; the same command starts over\n"
    assert run.returncode == 130
    assert_nothing_left(temporary)

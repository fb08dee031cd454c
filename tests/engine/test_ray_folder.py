"""Where a private Ray keeps its sessions: a short path, gone afterwards, and one line where it cannot be."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.engine import ray_folder
from pipeline.engine.ray_folder import BELOW, SOCKET_PATH, RayFolder
from pipeline.errors import BuildError
from tests.engine.test_signals import PRIVATE, left_behind
from tests.tiny_corpus import make_corpus, tiny_flags


@pytest.fixture
def tmpdir_is(monkeypatch):
    def put(path):
        monkeypatch.setattr(tempfile, "tempdir", str(path))

    return put


def test_a_long_tmpdir_gives_a_short_folder_elsewhere(tmp_path, tmpdir_is):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    tmpdir_is(long)
    folder = RayFolder()
    assert len(folder.path) + BELOW <= SOCKET_PATH
    assert os.path.isdir(folder.path)
    folder.close()
    assert not os.path.exists(folder.path or "/nonexistent")
    folder.close()


def test_two_drivers_have_two_folders_and_sweep_only_what_is_dead(tmpdir_is):
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as base:
        tmpdir_is(base)
        alive = RayFolder()
        dead = Path(base) / "lathe-ray-deadbeef"
        dead.mkdir()
        (dead / ".lock").touch()
        other = RayFolder()
        assert sorted(os.listdir(base)) == sorted(Path(f.path).name for f in (alive, other))
        other.close()
        alive.close()
        assert os.listdir(base) == []


def test_a_full_disk_is_one_line_that_names_the_folder_and_what_is_free(tmpdir_is, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as base:
        tmpdir_is(base)
        monkeypatch.setattr(ray_folder, "LEAST_FREE", 1 << 60)
        with pytest.raises(BuildError) as caught:
            RayFolder()
        assert base in str(caught.value)
        assert "free" in str(caught.value)
        assert "TMPDIR" in str(caught.value)
        assert os.listdir(base) == []


def test_no_writable_place_is_one_line_that_names_all(tmpdir_is, monkeypatch):
    monkeypatch.setattr(ray_folder, "ELSEWHERE", ("/proc", "/sys"))
    tmpdir_is("/proc/1")
    with pytest.raises(BuildError, match=r"tried /proc/1: .*; /proc: .*; /sys: "):
        RayFolder()


@pytest.mark.ray
def test_a_ray_that_does_not_start_is_one_line_and_exit_code_1(tmp_path):
    """Its raylet is killed whenever it appears."""
    corpus = make_corpus(tmp_path / "corpus", shards=1, samples=1)
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as base:
        environment = {**PRIVATE, "TMPDIR": base}
        command = [sys.executable, "-m", "pipeline", "encode", str(corpus), str(tmp_path / "out"), *tiny_flags()]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        killed, deadline = set(), time.monotonic() + 200
        while run.poll() is None:
            assert time.monotonic() < deadline
            for child in psutil.Process(run.pid).children():
                with suppress(psutil.Error):
                    if child.pid not in killed and child.name() == "raylet":
                        child.kill()
                        killed.add(child.pid)
            time.sleep(0.02)
        _, stderr = run.communicate()
        assert run.returncode == 1, stderr
        assert len(killed) == 2  # it was tried once more
        assert left_behind(Path(base)) == ([], [])
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("lathe: error:")]
    assert "did not start" in line
    assert base in line
    assert "free" in line

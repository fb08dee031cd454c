"""Folder of a private Ray: a short path, deleted at the end, or a one-line error."""

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.engine.driver.executor import Executor
from pipeline.engine.ray import folder as ray_folder
from pipeline.engine.ray import session as ray_session
from pipeline.engine.ray.folder import BELOW, SOCKET_PATH, RayFolder
from pipeline.errors import BuildError, StorageUnavailable


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


def test_two_drivers_have_two_folders_and_delete_only_those_of_ended_drivers(tmpdir_is):
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


def test_full_disk_is_one_line_with_the_folder_and_its_free_space(tmpdir_is, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as base:
        tmpdir_is(base)
        monkeypatch.setattr(ray_folder, "LEAST_FREE", 1 << 60)
        with pytest.raises(BuildError) as caught:
            RayFolder()
        assert base in str(caught.value)
        assert "free" in str(caught.value)
        assert "TMPDIR" in str(caught.value)
        assert os.listdir(base) == []


def test_error_without_a_writable_folder_is_one_line_that_names_all(tmpdir_is, monkeypatch):
    monkeypatch.setattr(ray_folder, "ELSEWHERE", ("/proc", "/sys"))
    tmpdir_is("/proc/1")
    with pytest.raises(BuildError, match=r"tried /proc/1: .*; /proc: .*; /sys: "):
        RayFolder()


def test_ray_is_started_twice_before_a_one_line_error(monkeypatch):
    """What Ray raises when its raylet is killed on start-up, twice. Really killed, it takes Ray 35 s a try to notice."""
    tries = []

    def dies(options, folder):
        assert Path(folder.path).is_dir()
        tries.append(folder.path)
        raise Exception(
            "The current node timed out during startup. This\ncould happen because some of the raylet failed"
        )

    monkeypatch.setattr(ray_session, "_Connection", dies)
    with pytest.raises(BuildError, match="did not start on this machine") as caught:
        ray_session.connect(None, cpus=1, object_store_bytes=0)
    assert len(tries) == 2
    assert not any(Path(path).exists() for path in tries)
    assert "\n" not in str(caught.value)
    assert tries[-1] in str(caught.value)
    assert "free" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_second_signal_while_ray_starts_leaves_no_folder(tmp_path, tmpdir_is, monkeypatch):
    tmpdir_is(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_session, "_Connection", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ray_session._start_private({})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [SystemExit(3), ImportError("libstdc++ is too old"), ConnectionError("no")])
def test_every_error_of_starting_ray_is_raised(monkeypatch, ending):
    def end(**_):
        raise ending

    monkeypatch.setattr("ray.init", end)
    with pytest.raises(type(ending)):
        ray_session._Connection({}, None)


def test_a_full_disk_at_the_end_does_not_replace_the_result_of_a_build(monkeypatch):
    def full():
        raise StorageUnavailable("temporary folder /tmp cannot be written: No space left on device")

    left = []
    monkeypatch.setattr(ray_session, "disconnect", lambda: left.append(True))
    monkeypatch.setattr("pipeline.engine.driver.executor.ScratchFolder", full)
    executor = object.__new__(Executor)
    executor._cluster = ray_session.Cluster(True, 1.0, 0.0, 1)
    with pytest.raises(BuildError, match="of the build"), executor:
        raise BuildError("of the build")
    with executor:
        pass
    assert left == [True, True]

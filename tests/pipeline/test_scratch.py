"""Temporary folders and files on a full disk, with missing permissions or foreign contents."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.worker import latent_spool
from pipeline.engine.worker.latent_spool import LatentSpool
from pipeline.errors import StorageUnavailable
from pipeline.process import scratch
from pipeline.process.scratch import PREFIX, ScratchFolder
from pipeline.reader.spool import Spool


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond `num_bytes`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unusable(tmp_path: Path, kind: str) -> str:
    """A path below which no folder can be created, even by root."""
    (tmp_path / "file").write_bytes(b"")
    return {"missing": str(tmp_path / "missing"), "a file": str(tmp_path / "file"), "read-only": "/proc"}[kind]


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_folder_that_cannot_be_created_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = unusable(tmp_path, kind)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.delenv("TMPDIR", raising=False)
    for make in (ScratchFolder, lambda: Spool(10).hold([b"x" * 20], 20)):
        with pytest.raises(StorageUnavailable) as caught:
            make()
        assert f"temporary folder {folder} cannot be written: " in str(caught.value)
        assert "TMPDIR" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_sweeping_skips_folders_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{PREFIX}file").write_bytes(b"")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / f"{PREFIX}link")
    (tmp_path / f"{PREFIX}unlocked").mkdir()
    (tmp_path / f"{PREFIX}odd" / ".lock").mkdir(parents=True)
    (tmp_path / f"{PREFIX}loop").mkdir()
    (tmp_path / f"{PREFIX}loop" / ".lock").symlink_to(".lock")
    before = set(os.listdir(tmp_path))
    folder = ScratchFolder()
    assert os.path.isdir(folder.path)
    folder.close()
    assert set(os.listdir(tmp_path)) == before


def test_a_video_that_fills_the_disk_is_a_storage_error_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(memory_bytes=10)
    with largest_file(5000), pytest.raises(StorageUnavailable, match=r"cannot be written: File too large"):
        spool.hold([b"x" * 3000] * 3, 9000)
    assert not any(files for _, _, files in os.walk(tmp_path) if ".lock" not in files)
    path = spool.hold([b"x" * 3000] * 3, 9000)  # there is space again
    assert os.path.getsize(path) == 9000
    spool.close()


def test_errors_of_the_store_while_spooling_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def pieces() -> Iterator[bytes]:
        yield b"x" * 20
        raise StorageUnavailable("connection reset")

    with pytest.raises(StorageUnavailable, match=r"^connection reset"):
        Spool(memory_bytes=10).hold(pieces(), 40)


@pytest.mark.parametrize("limit", [0, 3000, 7000])
def test_latents_that_fill_the_disk_are_an_error_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """While pieces are appended, and when the whole is mapped: a write to a map beyond a full disk would be SIGBUS."""
    monkeypatch.setattr(latent_spool, "MEMORY_BYTES", 100)
    piece = np.ones((4, 2, 16, 16), np.float16)  # 4 KiB
    spool = LatentSpool(tmp_path)
    with largest_file(limit), pytest.raises(StorageUnavailable, match=rf"{tmp_path}.*TMPDIR"):
        fill(spool, piece)
    assert list(tmp_path.iterdir()) == []


def fill(spool: LatentSpool, piece: np.ndarray) -> None:
    for _ in range(2):
        spool.append(piece)
    spool.finish()


def test_disk_space_of_memory_mapped_latents_is_reserved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_spool, "MEMORY_BYTES", 100)
    spool = LatentSpool(tmp_path)
    for _ in range(2):
        spool.append(np.ones((4, 2, 16, 16), np.float16))
    with largest_file(4000), pytest.raises(StorageUnavailable, match="File too large"):
        spool.finish()


def test_folders_are_made_by_scratch_because_others_outlive_a_kill() -> None:
    root = Path(scratch.__file__).parents[1]
    assert [path for path in root.rglob("*.py") if "TemporaryDirectory(" in path.read_text()] == []


def test_a_block_deletes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ScratchFolder() as folder:
        (folder / "table").write_bytes(b"x")
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []

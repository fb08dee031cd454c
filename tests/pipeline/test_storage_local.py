"""Create-only writes on a file system without hard links: one writer wins, and no partial file gets the final name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError, StorageUnavailable
from pipeline.storage import local as local_store
from pipeline.storage import open_store

# What FAT and some FUSE mounts answer; the rest of the file system is real.
NO_LINKS = (
    "import errno, os, signal, sys\n"
    "def refuse(*_): raise OSError(errno.EPERM, 'Operation not permitted')\n"
    "os.link = refuse\n"
    "from pipeline.config import StorageConfig\n"
    "from pipeline.storage import open_store\n"
    "store = open_store(sys.argv[1], StorageConfig())\n"
)


def _refuse(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_race_of_processes_has_one_winner_without_links(tmp_path: Path) -> None:
    code = NO_LINKS + (
        "print('ready', flush=True); sys.stdin.readline()\n"
        "won = [store.put_if_absent(f'{n}', (sys.argv[2] * 100000).encode()) for n in range(30)]\n"
        "print(''.join('1' if w else '0' for w in won))"
    )
    names = "abcd"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [racer.communicate()[0].strip() for racer in racers]
    store = open_store(str(tmp_path), StorageConfig())
    for n in range(30):
        winners = [name for name, flags in zip(names, won, strict=True) if flags[n] == "1"]
        assert len(winners) == 1
        assert store.read(f"{n}") == winners[0].encode() * 100000


@pytest.mark.parametrize(("call", "left"), [("replace", b""), ("samestat", b""), ("fsync", None)])
def test_a_kill_leaves_an_empty_object_or_none_but_never_a_part(tmp_path: Path, call: str, left: bytes | None) -> None:
    where = "os.path" if call == "samestat" else "os"
    code = NO_LINKS + (
        f"{where}.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nstore.put_if_absent('x', b'whole' * 10000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_store(str(tmp_path), StorageConfig())
    assert (store.read("x") if store.exists("x") else None) == left
    assert [info.size for info in store.list()] == ([] if left is None else [0])


def test_a_later_put_loses_unless_the_object_has_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    store = open_store(str(tmp_path), StorageConfig())
    assert store.put_if_absent("x", b"mine")
    assert not store.put_if_absent("x", b"theirs")
    assert store.put_if_absent("x", b"mine")
    (tmp_path / "y").touch()  # the claim of a process that was killed
    assert not store.put_if_absent("y", b"mine")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x", "y"]


def test_a_claim_that_was_removed_and_taken_by_another_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between our claim and our rename, another process takes the empty file for a dead claim and commits in its place.
    monkeypatch.setattr(os, "link", _refuse)
    store = open_store(str(tmp_path), StorageConfig())
    real = os.path.samestat

    def taken(*stats: os.stat_result) -> bool:
        (tmp_path / "other").write_bytes(b"theirs")
        os.replace(tmp_path / "other", tmp_path / "x")
        return real(stats[0], os.stat(tmp_path / "x"))

    monkeypatch.setattr(local_store.os.path, "samestat", taken)
    assert not store.put_if_absent("x", b"mine")
    assert store.read("x") == b"theirs"


def test_a_claim_that_was_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    store = open_store(str(tmp_path), StorageConfig())
    real, removed = os.fstat, []

    def remove(descriptor: int) -> os.stat_result:
        if not removed:
            removed.append(True)
            (tmp_path / "x").unlink()
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", remove)
    assert store.put_if_absent("x", b"mine")
    assert store.read("x") == b"mine"


def test_an_object_deleted_between_the_lost_link_and_its_reading_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path), StorageConfig())
    store.write("r.json", b"theirs")
    read = type(store).read

    def deleted_first(self: object, key: str) -> bytes:
        (tmp_path / key).unlink(missing_ok=True)
        return read(store, key)

    monkeypatch.setattr(type(store), "read", deleted_first)
    assert store.put_if_absent("r.json", b"ours")
    assert (tmp_path / "r.json").read_bytes() == b"ours"


def test_a_broken_link_under_the_name_is_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "r.json").symlink_to("nowhere")
    with pytest.raises(StorageUnavailable, match="the name was taken"):
        open_store(str(tmp_path), StorageConfig()).put_if_absent("r.json", b"ours")


@pytest.mark.parametrize("target", ["self", "other", "nowhere", "a.mp4/below", "x" * 300])
def test_broken_links_are_not_listed(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "self").symlink_to(target)
    (tmp_path / "other").symlink_to("self")
    assert [item.key for item in open_store(str(tmp_path), StorageConfig()).list()] == ["a.mp4"]
    assert list(open_store(str(tmp_path), StorageConfig()).keys()) == ["a.mp4"]


@pytest.mark.parametrize("asked", ["is_dir", "is_file", "stat", "os.stat"])
@pytest.mark.parametrize(
    ("number", "meaning"), [(errno.ESTALE, StorageUnavailable), (errno.EACCES, AccessError), (errno.EPERM, AccessError)]
)
def test_a_failing_stat_of_a_listed_file_is_an_error_of_the_storage_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, number: int, meaning: type[Exception]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    scandir, stat = os.scandir, os.stat

    def fail(path: str, **_: object) -> None:
        raise OSError(number, os.strerror(number), path)

    class Entry:
        """An entry of a file system whose folders do not say what is a file."""

        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path, self._entry = entry.name, entry.path, entry
            self.is_dir, self.stat = entry.is_dir, entry.stat
            if asked in ("is_dir", "stat"):
                setattr(self, asked, lambda: fail(entry.path))

        def is_file(self, *, follow_symlinks: bool = True) -> bool:
            if asked == "is_file" or not follow_symlinks:
                fail(self.path)
            return self._entry.is_file()

    if asked == "os.stat":
        monkeypatch.setattr(
            local_store.os,
            "stat",
            lambda path, **options: (fail if str(path).endswith("a.mp4") else stat)(path, **options),
        )
    else:
        monkeypatch.setattr(local_store.os, "scandir", lambda path: [Entry(entry) for entry in scandir(path)])
    with pytest.raises(meaning, match=r"a\.mp4"):
        list(open_store(str(tmp_path), StorageConfig()).list())

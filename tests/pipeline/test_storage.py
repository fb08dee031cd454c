"""The contract of `Store`, tested on a folder and on a real S3 server."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import InputError, NotFound, OutputError, SourceChanged
from pipeline.records import SourceObject
from pipeline.storage import Store, check_key, locate, open_source, open_store, read_uri, stat_uri

if TYPE_CHECKING:
    from tests.conftest import S3Server

MiB = 1024 * 1024


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"), StorageConfig())
    server: S3Server = request.getfixturevalue("s3")
    return open_store(f"{server.root}/some/prefix", server.config(part_bytes=64 * 1024, read_ahead_bytes=MiB))


def keys(store: Store, prefix: str = "", **options: bool) -> list[str]:
    return [info.key for info in store.list(prefix, **options)]


def test_an_object_is_read_as_it_was_written(store: Store) -> None:
    store.write("a/b.bin", b"\0\xff" * 500)
    assert store.read("a/b.bin") == b"\0\xff" * 500
    store.write("a/b.bin", b"")
    assert store.read("a/b.bin") == b""
    info = store.stat("a/b.bin")
    assert (info.key, info.size) == ("a/b.bin", 0)
    assert abs(info.modified - time.time()) < 60
    assert next(iter(store.list())) == info or store.root.startswith("s3://")  # Swift lists microseconds, HEAD does not


def test_missing_objects_are_not_found(store: Store) -> None:
    for ask in (store.stat, store.read, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(NotFound, match="no/such"):
            ask("no/such")
    assert not store.exists("no/such")
    store.delete("no/such")
    assert keys(store) == []
    assert keys(store, "no/") == []


def test_listing_is_in_key_order_and_by_string_prefix(store: Store) -> None:
    names = ["a-b", "a/b", "a/c/d", "a0", "é/ü +&=%20", "b/..c", "b/x'y\"z"]
    for name in names:
        store.write(name, b"x")
    assert keys(store) == sorted(names)
    assert keys(store, "a/") == ["a/b", "a/c/d"]
    assert keys(store, "a") == ["a-b", "a/b", "a/c/d", "a0"]
    assert keys(store, "a/", recursive=False) == ["a/b"]
    assert keys(store, recursive=False) == ["a-b", "a0"]
    for name in names:
        assert store.read(name) == b"x"
    for prefix in ("", "a/", "a", "no/"):
        assert list(store.keys(prefix)) == keys(store, prefix)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "./a", "a/.."])
def test_keys_cannot_leave_the_root(store: Store, key: str, tmp_path: Path) -> None:
    for act in (store.uri, store.stat, store.read, store.delete, store.exists):
        with pytest.raises(ValueError, match="expected a relative path"):
            act(key)
    for put in (store.write, store.put_if_absent):
        with pytest.raises(ValueError, match="expected a relative path"):
            put(key, b"x")
    with pytest.raises(ValueError, match="expected a relative path"):
        store.open_stream(key, size=1, etag="x")
    with pytest.raises(ValueError, match="expected a relative path"):
        store.upload(__file__, key)
    assert keys(store) == []


def test_a_key_with_a_backslash_can_be_read_but_not_written(tmp_path: Path) -> None:
    (tmp_path / "a\\b").write_bytes(b"x")
    store = open_store(str(tmp_path), StorageConfig())
    assert [store.read(info.key) for info in store.list()] == [b"x"]
    for change in (store.delete, lambda key: store.write(key, b"y"), lambda key: store.put_if_absent(key, b"y")):
        with pytest.raises(ValueError, match="backslash"):
            change("a\\b")
    assert store.read("a\\b") == b"x"


@pytest.mark.s3
def test_odd_keys_of_a_whole_bucket_can_be_read_but_not_written(s3: S3Server) -> None:
    key = "/a\\../../b"
    s3.client().put_object(Bucket=s3.bucket, Key=key, Body=b"x")
    store = open_store(s3.root, s3.config())
    info = store.stat(key)
    assert store.read(key) == store.read_range(key, 0, 9) == b"x"
    assert (info.key, locate(store.uri(key))) == (key, (s3.root, key))
    with store.open_stream(key, size=1, etag=info.etag) as stream:
        assert stream.read() == b"x"
    changes = [store.delete, lambda name: store.write(name, b"y"), lambda name: store.put_if_absent(name, b"y")]
    for change in [*changes, lambda name: store.upload(__file__, name)]:
        with pytest.raises(ValueError, match="expected a relative path"):
            change(key)
    assert store.read(key) == b"x"


def test_names_may_contain_dots() -> None:
    for key in ("a..b", "..a", "a/...", "v1.2/clip.final.mp4", "ü/é"):
        assert check_key(key) == key


def test_ranges_end_with_the_object_and_check_the_etag(store: Store) -> None:
    store.write("r", bytes(range(100)))
    etag = store.stat("r").etag
    assert store.read_range("r", 10, 5) == bytes(range(10, 15))
    assert store.read_range("r", 95, 50, etag=etag) == bytes(range(95, 100))
    assert store.read_range("r", 100, 5) == b""
    assert store.read_range("r", 500, 5) == b""
    assert store.read_range("r", 0, 0) == b""
    time.sleep(0.02)
    store.write("r", bytes(100))
    with pytest.raises(SourceChanged):
        store.read_range("r", 0, 10, etag=etag)


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.conditional_writes()
    assert store.put_if_absent("receipts/x", b"mine")
    assert not store.put_if_absent("receipts/x", b"yours")
    assert store.put_if_absent("receipts/x", b"mine"), "our own repeated request is ours"
    assert store.read("receipts/x") == b"mine"
    assert keys(store) == ["receipts/x"], "probes and scratch files are gone"


def _race(stores: list[Store], key: str) -> list[bool]:
    barrier = threading.Barrier(len(stores))
    won = [False] * len(stores)

    def put(n: int) -> None:
        barrier.wait()
        won[n] = stores[n].put_if_absent(key, b"%d" % n)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def _widen_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms between the two steps of a conditional put in moto: if puts were not served one at a time, most of a race would win."""
    from moto.s3.responses import S3Response

    between = S3Response._get_checksum
    monkeypatch.setattr(S3Response, "_get_checksum", lambda *arguments: (time.sleep(0.01), between(*arguments))[1])


@pytest.mark.parametrize("kind", ["local", pytest.param("moto", marks=pytest.mark.s3)])
def test_a_race_has_one_winner(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "local":
        stores: list[Store] = [open_store(str(tmp_path), StorageConfig()) for _ in range(8)]
    else:
        server: S3Server = request.getfixturevalue("moto")
        stores = [open_store(server.root, server.config()) for _ in range(8)]
        _widen_the_gap(monkeypatch)
    for n in range(5):
        won = _race(stores, f"race/{n}")
        assert sum(won) == 1
        assert stores[0].read(f"race/{n}") == b"%d" % won.index(True)


def test_uploads_store_all_bytes(store: Store, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 10)
    large.write_bytes(os.urandom(18 * MiB))
    for path in (small, large):
        info = store.upload(path, f"up/{path.name}")
        assert info.size == path.stat().st_size
        assert store.read(f"up/{path.name}") == path.read_bytes()
    with pytest.raises((NotFound, FileNotFoundError)):
        store.upload(tmp_path / "absent", "up/absent")
    assert keys(store, "up/") == ["up/large", "up/small"]


@pytest.mark.parametrize("step", [1, 777, 64 * 1024, 200_000, -1])
def test_streams_give_the_bytes_in_order(store: Store, step: int) -> None:
    data = os.urandom(300_001) if step != 1 else os.urandom(3000)
    store.write("s", data)
    info = store.stat("s")
    got = bytearray()
    with store.open_stream("s", size=info.size, etag=info.etag) as stream:
        while block := stream.read(step):
            got += block
            assert stream.tell() == len(got)
        assert stream.read(10) == b""
        assert stream.wait_s > 0
        assert stream.received_bytes == len(data)
    assert bytes(got) == data


def test_an_empty_object_streams_nothing(store: Store) -> None:
    store.write("e", b"")
    info = store.stat("e")
    with store.open_stream("e", size=0, etag=info.etag) as stream:
        assert stream.read() == b""


def test_a_stream_detects_a_replaced_object(store: Store) -> None:
    store.write("s", b"a" * 3 * MiB)
    listed = store.stat("s")
    time.sleep(0.02)
    store.write("s", b"b" * 3 * MiB)
    with pytest.raises(SourceChanged), store.open_stream("s", size=listed.size, etag=listed.etag) as stream:
        stream.read()


def test_a_stream_detects_an_object_replaced_while_it_is_read(store: Store) -> None:
    store.write("s", b"a" * 3 * MiB)
    listed = store.stat("s")
    with store.open_stream("s", size=listed.size, etag=listed.etag) as stream:
        assert stream.read(1000) == b"a" * 1000
        time.sleep(0.02)
        if store.root.startswith("s3://"):
            store.write("s", b"b" * 3 * MiB)
        else:
            with open(store.uri("s"), "ab") as file:  # a rename keeps the open file as it was, which is fine
                file.write(b"b")
        with pytest.raises(SourceChanged):
            stream.read()


def test_closing_a_stream_ends_a_waiting_read(store: Store) -> None:
    store.write("s", bytes(MiB))
    info = store.stat("s")
    stream = store.open_stream("s", size=info.size, etag=info.etag)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.read(10)


def test_pickled_stores_work_in_another_process(store: Store) -> None:
    store.write("p", b"hello")
    assert pickle.loads(pickle.dumps(store)).read("p") == b"hello"  # noqa: S301
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read('p').decode())"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True)
    assert done.stdout.strip() == b"hello"


def test_functions_of_whole_uris_give_the_same_objects(store: Store, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue("s3").config() if store.root.startswith("s3://") else StorageConfig()
    store.write("deep/er/x.tar", b"abc")
    uri = store.uri("deep/er/x.tar")
    root, key = locate(uri)
    assert open_store(root, config).uri(key) == uri
    assert read_uri(uri, config) == b"abc"
    info = stat_uri(uri, config)
    with open_source(SourceObject(uri, info.size, info.etag), config) as stream:
        assert stream.read() == b"abc"


def test_check_writable_leaves_no_object(store: Store) -> None:
    store.check_writable()
    store.preflight()
    assert keys(store) == []


def test_other_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="'gs' is not supported"):
        open_store("gs://bucket/x", StorageConfig())
    with pytest.raises(InputError, match="no bucket"):
        open_store("s3://", StorageConfig())


def test_file_uris_are_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    open_store(folder.as_uri(), StorageConfig()).write("x", b"1")
    assert (folder / "x").read_bytes() == b"1"


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_nothing_to_be_listed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pipeline.storage.local import LocalStore; import pipeline.storage.local as local\n"
        "local.os.replace = local.os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "getattr(LocalStore(sys.argv[1]), sys.argv[2])('x', b'half')"
    )
    for method in ("write", "put_if_absent"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), method], check=False)
        assert done.returncode == -9
    store = open_store(str(tmp_path), StorageConfig())
    assert keys(store) == []
    assert len(list(tmp_path.iterdir())) == 2, "the leftovers are there, hidden"
    assert store.put_if_absent("x", b"whole")


def test_creation_is_exclusive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # as FAT and some FUSE mounts do
    stores = [open_store(str(tmp_path), StorageConfig()) for _ in range(8)]
    assert sum(_race(stores, "x")) == 1
    assert keys(stores[0]) == ["x"]


def test_links_are_followed_except_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert keys(open_store(str(tmp_path), StorageConfig())) == ["a/x", "b/x"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OutputError, match=r"file.*cannot be written"):
        open_store(str(blocked / "out"), StorageConfig()).check_writable()


def test_many_receipts_list_fast(tmp_path: Path) -> None:
    for n in range(5000):
        (tmp_path / f"{n:05d}.json").touch()
    began = time.process_time()
    assert len(keys(open_store(str(tmp_path), StorageConfig()))) == 5000
    assert time.process_time() - began < 2.0

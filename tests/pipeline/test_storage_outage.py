"""A store that does not answer, is busy or slow: every request is retried for `patience_s`, on real sockets."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError, NotFound, StorageUnavailable
from pipeline.storage import Store, connection, mark_reached, open_store, patience
from pipeline.storage.connection import connect
from tests.faulty_proxy import Fault, FaultyProxy, always, first
from tests.swift_server import free_ports

if TYPE_CHECKING:
    from tests.conftest import S3Server

pytestmark = pytest.mark.s3
KiB, MiB = 1024, 1024 * 1024
GIVEN_UP = re.compile(r"did not answer for ([\d.]+) s \((\d+) tr(?:y|ies), ConnectionRefused\)")


def through(proxy: FaultyProxy, **fields: object) -> StorageConfig:
    return StorageConfig(**{"endpoint_url": proxy.endpoint, "patience_s": 60.0, **fields})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _nothing_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoints of other tests may have had the same port."""
    monkeypatch.setattr(patience, "_reached", set())


# --- outage -------------------------------------------------------------------------------------------------------------


def test_sixteen_threads_survive_a_store_that_is_away_for_seconds(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    over = threading.Event()

    def work(n: int) -> int:
        rounds = 0
        while not over.is_set():
            key = f"{n:02d}-{rounds}"
            assert store.put_if_absent(f"put/{key}", key.encode())
            store.upload(path, f"up/{key}")
            assert store.read(f"put/{key}") == key.encode()
            assert f"put/{key}" in [info.key for info in store.list(f"put/{key}")]
            store.delete(f"up/{key}")
            rounds += 1
        return rounds

    with FaultyProxy(s3.address) as proxy, ThreadPoolExecutor(16) as pool:
        store = open_store(s3.root, through(proxy))
        store.write("first", b"contact")
        work_of = [pool.submit(work, n) for n in range(16)]
        time.sleep(0.5)
        with proxy.fault("away"):
            time.sleep(4.0)
        over.set()
        assert all(done.result(240) >= 1 for done in work_of)


def test_every_request_to_a_store_that_is_away_is_retried_until_its_patience_ends(s3: S3Server) -> None:
    # botocore's own retries share a quota of about a hundred: later requests were tried once and failed at once.
    def ask(n: int) -> tuple[float, int]:
        with pytest.raises(StorageUnavailable) as caught:
            store.read(f"{n}")
        found = GIVEN_UP.search(str(caught.value))
        assert found, caught.value
        return float(found[1]), int(found[2])

    with FaultyProxy(s3.address) as proxy, ThreadPoolExecutor(16) as pool:
        store = open_store(s3.root, through(proxy, patience_s=1.0))
        store.write("first", b"contact")
        proxy.turn_on("away")
        answers = list(pool.map(ask, range(64)))
    assert len(answers) == 64
    assert all(seconds >= 1.0 for seconds, _ in answers), answers
    assert sum(tries for _, tries in answers) >= 3 * 64, answers


def test_max_attempts_limits_the_tries_for_any_patience(s3: S3Server) -> None:
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy, patience_s=600, max_attempts=3))
        store.write("x", b"1")
        proxy.turn_on("throttle", code="")
        for act in (lambda: store.read("x"), lambda: store.stat("x"), lambda: list(store.list())):
            before = proxy.faults
            with pytest.raises(StorageUnavailable, match=r"answered 503 for .* \(3 tries\)"):
                act()
            assert proxy.faults == before + 3


def test_a_closed_stream_ends_the_pauses_of_its_requests(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 300.0)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 300.0)
    data = os.urandom(MiB)
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy, patience_s=600, part_bytes=128 * KiB))
        store.write("big", data)
        info = store.stat("big")
        proxy.turn_on("throttle")
        stream = store.open_stream("big", size=info.size, etag=info.etag)
        _until(lambda: proxy.hits["throttle"] == 8)  # every part waits for its second try
        threading.Timer(0.2, stream.close).start()
        with pytest.raises(ValueError, match=r"closed|cancelled"):
            stream.read()
        _until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")])


def test_a_process_that_exits_does_not_wait_for_its_uploads(s3: S3Server, tmp_path: Path) -> None:
    code = (
        "import sys, threading, time\n"
        "from pipeline.config import StorageConfig\n"
        "from pipeline.storage import mark_reached, open_store, patience\n"
        "patience.FIRST_PAUSE_S = patience.LONGEST_PAUSE_S = 300\n"
        "config = StorageConfig(endpoint_url=sys.argv[1], patience_s=600)\n"
        "mark_reached(config)\n"
        "store = open_store('s3://bucket', config)\n"
        "threading.Thread(target=store.upload, args=(sys.argv[2], 'x'), daemon=True).start()\n"
        "while not any('ThreadPool' in thread.name for thread in threading.enumerate()): time.sleep(0.02)\n"
        "time.sleep(0.5)\n"
        "print([thread.name for thread in threading.enumerate() if 'ThreadPool' in thread.name])"
    )
    path = tmp_path / "file"
    path.write_bytes(b"x")
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-c", code, f"http://127.0.0.1:{port}", str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "ThreadPoolExecutor" in done.stdout, "the upload was under way"


# --- busy and broken answers --------------------------------------------------------------------------------------------


def _each_kind_fails_first(times: int) -> tuple[Callable[[str, str, int], Fault | None], dict[str, int]]:
    """A rule: the first requests of each kind get a status of a temporary failure, without a code."""
    seen: dict[str, int] = {}
    statuses = itertools.cycle((503, 500, 502, 504, 429, 408))

    def rule(method: str, target: str, before: int) -> Fault | None:
        part = re.search(r"partNumber=\d+", target) or re.search(r"list-type|uploads|uploadId", target)
        page = "+token" if "continuation-token" in target else ""
        kind = f"{method} {part[0] if part else ''}{page}"
        seen[kind] = seen.get(kind, 0) + 1
        return Fault("status", code=next(statuses), body=b"") if seen[kind] <= times else None

    return rule, seen


def test_every_kind_of_request_survives_a_busy_store(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(17 * MiB))
    rule, seen = _each_kind_fails_first(2)
    sent: list[int] = []
    with FaultyProxy(s3.address, rule) as proxy:
        config = through(proxy)
        store = open_store(s3.root, config)
        pages = "provide-client-params.s3.ListObjectsV2"
        connect(config).client.meta.events.register(pages, lambda params, **_: {**params, "MaxKeys": 1})
        store.write("a", b"1")
        assert store.upload(path, "b", progress=sent.append).size == 17 * MiB
        assert store.stat("a").size == 1
        assert store.read("a") == b"1"
        assert [info.key for info in store.list()] == ["a", "b"]
        store.delete("a")
        assert not store.exists("a")
    kinds = {"PUT ", "HEAD ", "GET ", "DELETE ", "GET list-type", "GET list-type+token"}
    kinds |= {"POST uploads", "POST uploadId", "PUT partNumber=1", "PUT partNumber=2"}
    assert kinds <= set(seen)
    assert all(seen[kind] > 2 for kind in kinds), seen
    assert min(sent) > 0
    assert sum(sent) >= 17 * MiB


@pytest.mark.parametrize("name", ["cut", "lose_answer"])
def test_broken_answers_of_every_kind_are_retried(s3: S3Server, name: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(17 * MiB))
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy))
        lost: dict[str, object] = {"after_bytes": 10} if name == "cut" else {}

        def suffers(methods: str, keys: str, act: Callable[[], object]) -> object:
            proxy.turn_on(name, methods=methods, keys=keys, times=1, **lost)  # type: ignore[arg-type]
            before = proxy.hits[name]
            outcome = act()
            assert proxy.hits[name] == before + 1
            return outcome

        suffers("POST", "uploadId", lambda: store.upload(path, "big"))  # the answer to "complete"
        assert store.stat("big").size == 17 * MiB
        if name == "lose_answer":
            suffers("PUT", "small", lambda: store.write("small", b"1"))
            suffers("HEAD", "small", lambda: store.stat("small"))
            suffers("DELETE", "small", lambda: store.delete("small"))
        suffers("GET", "list-type", lambda: list(store.list()))
        with pytest.raises(NotFound):  # the body of an error answer breaks off
            suffers("GET", "missing", lambda: store.read("missing"))
        assert [info.key for info in store.list()] == ["big"]


def test_an_upload_that_the_server_lost_is_not_taken_for_an_older_object(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(17 * MiB))
    gone = Fault("status", code=404, body=b"<Error><Code>NoSuchUpload</Code></Error>")
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy))
        proxy.rule = lambda method, target, _: gone if method == "POST" and "uploadId" in target else None
        with pytest.raises(StorageUnavailable, match="NoSuchUpload"):
            store.upload(path, "big")
        proxy.rule = lambda *_: None
        store.upload(path, "big")
        path.write_bytes(b"1" * 17 * MiB)
        proxy.rule = lambda method, target, _: gone if method == "POST" and "uploadId" in target else None
        with pytest.raises(StorageUnavailable, match="NoSuchUpload"):
            store.upload(path, "big")  # same size, other bytes


def test_arriving_bytes_restart_the_patience_of_a_download(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.2)
    data = os.urandom(2 * MiB)
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=128 * KiB))) as proxy:
        store = open_store(s3.root, through(proxy, patience_s=1.5))
        store.write("big", data)
        began = time.monotonic()
        assert store.read("big") == data
        assert time.monotonic() - began > 1.5


def test_received_bytes_grow_before_a_part_is_whole(s3: S3Server) -> None:
    data = os.urandom(2 * MiB)
    with FaultyProxy(s3.address, first(1, Fault("stall", after_bytes=600 * KiB))) as proxy:
        store = open_store(s3.root, through(proxy, read_timeout_s=45.0))
        store.write("big", data)
        info = store.stat("big")
        with store.open_stream("big", size=info.size, etag=info.etag) as stream:
            _until(lambda: stream.received_bytes >= 512 * KiB)
            assert stream.tell() == 0
            assert stream.received_bytes < len(data), "the only part is not finished"


# --- wrong address or outage --------------------------------------------------------------------------------------------

NOWHERE = pytest.mark.parametrize(
    ("address", "kind"),
    [("http://127.0.0.1:{port}", "ConnectionRefused"), ("http://nowhere.invalid:9000", "NameResolution")],
)


def _requests(store: Store, path: Path) -> list[Callable[[], object]]:
    return [
        lambda: store.read("x"),
        lambda: list(store.list()),
        lambda: store.write("x", b""),
        lambda: store.upload(path, "x"),
        lambda: store.put_if_absent("x", b""),
    ]


@NOWHERE
def test_an_endpoint_that_never_answered_is_a_wrong_address_within_seconds(
    s3_server: S3Server, address: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_CONTACT_S", 0.1)
    (tmp_path / "x").touch()
    config = StorageConfig(endpoint_url=address.format(port=free_ports(1)[0]), patience_s=600)
    for act in _requests(open_store("s3://bucket", config), tmp_path / "x"):
        with pytest.raises(AccessError, match=rf"cannot be reached .*{kind}.*check endpoint_url"):
            act()


@NOWHERE
def test_an_endpoint_marked_as_reached_is_an_outage_and_not_a_wrong_address(
    s3_server: S3Server, address: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_CONTACT_S", 0.0)
    (tmp_path / "x").touch()
    config = StorageConfig(endpoint_url=address.format(port=free_ports(1)[0]), patience_s=0.5)
    mark_reached(config)
    for act in _requests(open_store("s3://bucket", config), tmp_path / "x"):
        with pytest.raises(StorageUnavailable, match=rf"did not answer for [\d.]+ s \(\d+ tr(y|ies), {kind}\)"):
            act()


def test_an_answered_preflight_marks_the_endpoint_as_reached(s3: S3Server) -> None:
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy, patience_s=0.5))
        store.preflight()  # has a client of its own
        with proxy.fault("away"), pytest.raises(StorageUnavailable):
            store.read("x")


# --- probe --------------------------------------------------------------------------------------------------------------


def test_a_probe_is_one_request(s3: S3Server) -> None:
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy, patience_s=600))
        with proxy.fault("away"), pytest.raises(StorageUnavailable, match="1 try"):
            store.probe()  # also if the endpoint never answered
        store.probe()
        assert len(proxy.requests) == 1
        for name, error in (("throttle", StorageUnavailable), ("refuse", AccessError)):
            with proxy.fault(name), pytest.raises(error):  # type: ignore[arg-type]
                store.probe()
        assert len(proxy.requests) == 3
        with proxy.fault("throttle", status=500, code="InternalError"), pytest.raises(StorageUnavailable):
            store.probe()


def test_a_probe_of_a_folder_checks_its_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "not" / "made"), StorageConfig())
    store.probe()
    (tmp_path / "not").touch()  # a file where a folder is expected: the mount answers
    store.probe()
    (tmp_path / "not").unlink()
    real = os.stat
    for number in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN):

        def lost(path: str, number: int = number) -> os.stat_result:
            if path == str(tmp_path):
                raise OSError(number, os.strerror(number), path)
            return real(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", lost)
            with pytest.raises(StorageUnavailable, match=str(tmp_path)):
                store.probe()


def _until(true: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""Broken connections, busy servers and servers that ignore conditions, with real servers and sockets."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError, LatheError, SourceChanged, StorageUnavailable
from pipeline.storage import open_store, retries
from tests.careless_store import CarelessStore
from tests.faulty_proxy import Fault, FaultyProxy, always, first

if TYPE_CHECKING:
    from tests.conftest import S3Server

pytestmark = pytest.mark.s3
KiB, MiB = 1024, 1024 * 1024


@pytest.fixture
def data(s3: S3Server) -> bytes:
    data = os.urandom(2 * MiB + 12345)
    open_store(s3.root, s3.config()).write("big", data)
    return data


def through(proxy: FaultyProxy, **fields: object) -> StorageConfig:
    quick = {"part_bytes": 256 * KiB, "read_ahead_bytes": MiB, "max_attempts": 3, "read_timeout_s": 2.0}
    return StorageConfig(**{"endpoint_url": proxy.endpoint, **quick, **fields})  # type: ignore[arg-type]


def test_a_stream_resumes_every_broken_range_at_the_byte_reached(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, first(12, Fault("cut", after_bytes=100 * KiB))) as proxy:
        store = open_store(s3.root, through(proxy))
        info = store.stat("big")
        with store.open_stream("big", size=info.size, etag=info.etag) as stream:
            assert stream.read() == data
        assert proxy.faults == 12
        assert proxy.body_bytes == len(data), "no byte was fetched twice"


def test_a_download_survives_endless_breaks_while_bytes_arrive(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=200 * KiB))) as proxy:
        store = open_store(s3.root, through(proxy))
        assert store.read("big") == data
        assert store.read_range("big", 1000, MiB) == data[1000 : 1000 + MiB]


def test_a_stalled_body_is_resumed(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, first(1, Fault("stall", after_bytes=50 * KiB))) as proxy:
        store = open_store(s3.root, through(proxy, read_timeout_s=0.5))
        assert store.read("big") == data


def test_a_server_that_sends_nothing_is_unavailable_not_empty(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=0))) as proxy:
        store = open_store(s3.root, through(proxy))
        info = store.stat("big")
        for act in (lambda: store.read("big"), lambda: store.read_range("big", 0, 10)):
            with pytest.raises(StorageUnavailable, match=r"broke the connection at byte 0 for .* \(3 tries"):
                act()
        stream = store.open_stream("big", size=info.size, etag=info.etag)
        with stream, pytest.raises(StorageUnavailable):
            stream.read()
        with pytest.raises(ValueError, match="closed"):
            stream.read(1)  # never the bytes behind the gap


@pytest.mark.parametrize("after_bytes", [0, 100])
def test_a_listing_that_was_cut_off_is_asked_for_again_not_empty(s3: S3Server, data: bytes, after_bytes: int) -> None:
    before = retries()
    with FaultyProxy(s3.address, first(2, Fault("cut", after_bytes=after_bytes))) as proxy:
        store = open_store(s3.root, through(proxy))
        assert [info.key for info in store.list()] == ["big"]
        assert proxy.faults == retries() - before == 2
        proxy.rule = always(Fault("cut", after_bytes=after_bytes))
        with pytest.raises(StorageUnavailable, match=r"\(3 tries"):
            list(store.list())


def test_a_few_broken_answers_are_no_reason_to_refuse_a_store(s3: S3Server) -> None:
    faults = [Fault("status"), Fault("cut", after_bytes=0), Fault("cut", after_bytes=10), Fault("lose")]
    with FaultyProxy(s3.address, lambda *_: faults.pop() if faults else None) as proxy:
        open_store(s3.root, through(proxy)).preflight()
        assert proxy.faults == 4


@pytest.mark.parametrize(("code", "said"), [(500, b"InternalError"), (503, b"SlowDown"), (429, b"TooManyRequests")])
def test_busy_answers_are_retried(s3: S3Server, code: int, said: bytes) -> None:
    busy = Fault("status", code=code, body=b"<Error><Code>%s</Code></Error>" % said)
    with FaultyProxy(s3.address, first(1, busy, "PUT")) as proxy:
        store = open_store(s3.root, through(proxy, max_attempts=2))
        store.write("w", b"1")
        proxy.rule = first(1, busy, "GET")
        assert store.read("w") == b"1"
        proxy.rule = always(busy)
        with pytest.raises(StorageUnavailable):
            store.read("w")
        assert proxy.faults == 4


def test_an_outage_after_contact_is_not_a_wrong_address(s3: S3Server) -> None:
    with FaultyProxy(s3.address, always(Fault("cut"), "NEVER")) as proxy:
        store = open_store(s3.root, through(proxy, max_attempts=2, connect_timeout_s=0.5))
        store.write("x", b"1")
    with pytest.raises(StorageUnavailable):  # the listener is gone
        store.read("x")


def test_put_if_absent_succeeds_if_only_its_answer_was_lost(s3: S3Server) -> None:
    # The server stores, its answer gets lost, the request is repeated and answered with 412.
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, through(proxy))
        proxy.turn_on("lose_answer", methods="PUT", times=1)
        assert store.put_if_absent("receipt", b"mine")
        assert proxy.hits["lose_answer"] == 1
        assert not store.put_if_absent("receipt", b"theirs")
    assert open_store(s3.root, s3.config()).read("receipt") == b"mine"


def test_a_failed_upload_leaves_no_object_and_no_parts(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(34 * MiB))

    def third_part(method: str, target: str, before: int) -> Fault | None:
        return Fault("status") if method == "PUT" and "partNumber=3" in target else None

    with FaultyProxy(s3.address, third_part) as proxy:
        store = open_store(s3.root, through(proxy, max_attempts=2))
        with pytest.raises(StorageUnavailable):
            store.upload(path, "up/large")
        assert proxy.faults == 2
    assert not open_store(s3.root, s3.config()).exists("up/large")
    assert s3.client().list_multipart_uploads(Bucket=s3.bucket).get("Uploads", []) == []


def test_a_multipart_upload_survives_a_busy_server(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(34 * MiB))
    with FaultyProxy(s3.address, first(2, Fault("status"), "PUT")) as proxy:
        info = open_store(s3.root, through(proxy)).upload(path, "up/large")
    stored = open_store(s3.root, s3.config()).read("up/large")
    assert info.size == len(stored)
    assert hashlib.sha256(stored).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_closing_a_stream_ends_a_read_on_a_dead_socket(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, always(Fault("stall", after_bytes=10))) as proxy:
        store = open_store(s3.root, through(proxy, read_timeout_s=280))
        info = store.stat("big")
        stream = store.open_stream("big", size=info.size, etag=info.etag)
        threading.Timer(0.3, stream.close).start()
        began = time.perf_counter()
        with pytest.raises(ValueError, match="closed"):
            stream.read()
        assert time.perf_counter() - began < 140


def test_read_ahead_keeps_within_its_window(s3: S3Server, data: bytes) -> None:
    with FaultyProxy(s3.address, lambda *_: None) as proxy:
        store = open_store(s3.root, through(proxy))  # four parts of 256 KiB
        info = store.stat("big")
        with store.open_stream("big", size=info.size, etag=info.etag) as stream:
            stream.read(1)
            time.sleep(1.0)
            assert sum(method == "GET" for method, _ in proxy.requests) == 4
            stream.read(256 * KiB)
            time.sleep(0.5)
            assert sum(method == "GET" for method, _ in proxy.requests) == 5


# --- careless servers ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _credentials(s3_server: S3Server) -> None:
    """They are in the environment while the real server runs; the careless one accepts any."""


def careless(server: CarelessStore, **fields: object) -> StorageConfig:
    return StorageConfig(**{"endpoint_url": server.endpoint, "max_attempts": 3, **fields})  # type: ignore[arg-type]


def test_ranges_answered_with_200_are_accepted_by_their_content_range() -> None:
    with CarelessStore(ranges="as_200") as server:
        store = open_store("s3://bucket", careless(server, part_bytes=64 * KiB))
        data = os.urandom(300 * KiB)
        store.write("x", data)
        info = store.stat("x")
        assert store.read_range("x", 100, 50) == data[100:150]
        with store.open_stream("x", size=info.size, etag=info.etag) as stream:
            assert stream.read() == data


def test_a_server_without_ranges_serves_small_objects_and_is_refused_beyond() -> None:
    with CarelessStore(ranges="ignored") as server:
        store = open_store("s3://bucket", careless(server, part_bytes=64 * KiB))
        store.write("small", b"x" * 1000)
        info = store.stat("small")
        with store.open_stream("small", size=1000, etag=info.etag) as stream:
            assert stream.read() == b"x" * 1000
        with pytest.raises(AccessError, match="must support ranges"):
            store.read_range("small", 10, 5)


def test_a_replaced_object_is_detected_on_a_server_that_ignores_if_match() -> None:
    with CarelessStore() as server:
        store = open_store("s3://bucket", careless(server, part_bytes=64 * KiB))
        store.write("x", b"a" * 200 * KiB)
        listed = store.stat("x")
        store.write("x", b"b" * 200 * KiB)
        with pytest.raises(SourceChanged, match="replaced"):
            store.read_range("x", 0, 10, etag=listed.etag)
        with store.open_stream("x", size=listed.size, etag=listed.etag) as stream, pytest.raises(SourceChanged):
            stream.read()


def test_stores_without_conditional_writes_are_detected() -> None:
    with CarelessStore() as server:
        store = open_store("s3://bucket", careless(server))
        assert not store.conditional_writes()
        assert server.objects == {}
        puts = server.puts
        assert not store.conditional_writes()
        assert server.puts == puts, "asked once"


@pytest.mark.parametrize("code", [400, 501])
@pytest.mark.parametrize("asked", [True, False])
def test_a_store_that_refuses_conditions_is_looked_at_before_a_plain_put(code: int, asked: bool) -> None:
    with CarelessStore(put_answers=(code,) * 9) as server:
        store = open_store("s3://bucket", careless(server))
        if asked:
            assert not store.conditional_writes()
            assert server.objects == {}
        assert store.put_if_absent("x", b"mine")
        assert not store.put_if_absent("x", b"theirs")
        assert store.put_if_absent("x", b"mine")
        assert server.objects == {"/bucket/x": b"mine"}
        assert len(server.put_answers) == (8 if asked else 7), "asked once"


def test_a_refused_create_is_an_error_if_the_store_has_conditions(moto: S3Server) -> None:
    with FaultyProxy(moto.address) as proxy:
        store = open_store(moto.root, through(proxy))
        body = b"<Error><Code>InvalidArgument</Code></Error>"
        proxy.rule = lambda method, target, _: Fault("status", code=400, body=body) if target.endswith("/x") else None
        with pytest.raises(AccessError, match="InvalidArgument"):
            store.put_if_absent("x", b"mine")
        assert store.conditional_writes()


def test_a_conflict_is_retried() -> None:
    with CarelessStore(put_answers=(409, 409)) as server:
        assert open_store("s3://bucket", careless(server)).put_if_absent("x", b"mine")
        assert server.puts == 3
    with CarelessStore(put_answers=(409,) * 9) as server, pytest.raises(StorageUnavailable):
        open_store("s3://bucket", careless(server)).put_if_absent("x", b"mine")


def test_a_412_is_success_if_the_object_has_our_bytes() -> None:
    with CarelessStore(put_answers=(412,), store_first=True) as server:
        assert open_store("s3://bucket", careless(server)).put_if_absent("x", b"mine")
    with CarelessStore(put_answers=(412,)) as server:
        store = open_store("s3://bucket", careless(server))
        store.write("x", b"theirs")
        assert not store.put_if_absent("x", b"mine")


def test_every_status_becomes_an_error_of_lathe(s3: S3Server) -> None:
    bodies = (b"", b"not xml", b"<Error><Code>Strange</Code><Message>secret AKIA</Message></Error>")
    with FaultyProxy(s3.address, lambda *_: None) as proxy:
        store = open_store(s3.root, through(proxy, max_attempts=1))
        for code in (400, 401, 403, 404, 405, 409, 412, 416, 429, 500, 501, 502, 503, 504):
            for body in bodies:
                proxy.rule = always(Fault("status", code=code, body=body), "PUT")
                with pytest.raises(LatheError) as caught:
                    store.write("x", b"1")
                assert "AKIA" not in str(caught.value)
                transient = code in {409, 429, 500, 502, 503, 504}
                assert isinstance(caught.value, StorageUnavailable) == transient, (code, body, caught.value)

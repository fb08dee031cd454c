"""The proxy of the fault tests: each named fault, on and off, before a real server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError, StorageUnavailable
from pipeline.storage import open_store
from tests.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.conftest import S3Server

pytestmark = pytest.mark.s3


def once(proxy: FaultyProxy, **fields: object) -> StorageConfig:
    return StorageConfig(**{"endpoint_url": proxy.endpoint, "max_attempts": 1, **fields})  # type: ignore[arg-type]


def test_faults_apply_only_while_on_and_only_to_named_requests(s3: S3Server) -> None:
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, once(proxy))
        impatient = open_store(s3.root, once(proxy, read_timeout_s=0.5))
        store.write("a", b"1" * 1000)
        store.write("b", b"2" * 1000)
        for name, error in (("throttle", StorageUnavailable), ("refuse", AccessError), ("stall", StorageUnavailable)):
            with proxy.fault(name, keys="/a$", methods="GET"):  # type: ignore[arg-type]
                with pytest.raises(error):
                    (impatient if name == "stall" else store).read("a")
                assert store.stat("a").size == 1000
                assert store.read("b") == b"2" * 1000
            assert store.read("a") == b"1" * 1000
            assert proxy.hits[name] == 1
        for _ in range(2):
            with proxy.fault("away"), pytest.raises(StorageUnavailable, match="ConnectionRefused"):
                store.read("a")
            assert store.read("a") == b"1" * 1000
        proxy.turn_on("cut", after_bytes=100, times=2)
        assert open_store(s3.root, once(proxy, max_attempts=3)).read("a") == b"1" * 1000
        assert proxy.hits["cut"] == 2


def test_a_slow_connection_has_its_rate_and_latency_in_both_directions(s3: S3Server) -> None:
    data = bytes(400_000)
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, once(proxy))
        store.write("x", data)
        with proxy.fault("slow", latency_s=0.2, bytes_per_s=1e6):
            for act in (lambda: store.write("x", data), lambda: store.read("x")):
                began = time.monotonic()
                act()
                assert time.monotonic() - began >= 0.55


@pytest.mark.parametrize("kind", ["s3", "moto"])
def test_a_lying_store_lets_every_conditional_put_succeed(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    with FaultyProxy(server.address) as proxy:
        store = open_store(server.root, once(proxy))
        assert store.put_if_absent("x", b"1")
        assert not store.put_if_absent("x", b"2")
        with proxy.fault("lie"):
            assert store.put_if_absent("x", b"2")
            assert store.read("x") == b"2"
            assert not store.conditional_writes()
        assert not store.put_if_absent("x", b"3")
        assert open_store(server.root, once(proxy)).conditional_writes()

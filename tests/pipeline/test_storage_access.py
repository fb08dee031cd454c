"""Wrong credentials, buckets and endpoints: reported within seconds, by name, without a secret."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError
from pipeline.storage import open_store
from tests.swift_server import free_ports

if TYPE_CHECKING:
    from tests.conftest import S3Server

MiB = 1024 * 1024


# --- what a person must fix ---------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_wrong_credentials_name_the_bucket_and_no_secret(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:intruder")
    store = open_store(s3.root, s3.config(max_attempts=2, connect_timeout_s=1.25))  # a client of its own
    for act in (store.preflight, store.check_writable, lambda: store.read("x"), lambda: list(store.list())):
        with pytest.raises(AccessError, match=s3.bucket) as caught:
            act()
        assert "403" in str(caught.value)
        assert "not-the-secret" not in str(caught.value)
        assert "intruder" not in str(caught.value)


@pytest.mark.s3
def test_missing_credentials_name_the_variables_to_set(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
        open_store(s3.root, s3.config(connect_timeout_s=1.125)).preflight()  # a client of its own


@pytest.mark.s3
def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket-here/x", s3.config())
    for act in (store.preflight, store.check_writable, lambda: list(store.list())):
        with pytest.raises(AccessError, match="no-such-bucket-here"):
            act()


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:{port}", "http://nowhere.invalid:9000", "http://user:hunter2@127.0.0.1:{port}"]
)
def test_an_unreachable_endpoint_fails_in_seconds(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    (port,) = free_ports(1)
    store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint.format(port=port)))
    began = time.perf_counter()
    with pytest.raises(AccessError, match="endpoint") as caught:
        store.preflight()
    assert time.perf_counter() - began < 120
    assert "hunter2" not in str(caught.value)


def test_a_first_contact_that_is_refused_is_a_wrong_address(s3_server: S3Server) -> None:
    (port,) = free_ports(1)
    store = open_store("s3://bucket", StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", max_attempts=1))
    for act in (
        lambda: list(store.list()),
        lambda: store.read("x"),
        lambda: store.write("x", b""),
        store.conditional_writes,
    ):
        with pytest.raises(AccessError, match="cannot be reached"):
            act()


def test_client_settings_depend_on_the_endpoint(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage.connection import Connection
    from pipeline.storage.s3 import UPLOADS
    from pipeline.storage.stream import MOST_THREADS

    assert UPLOADS.preferred_transfer_client == "classic"
    for named in (True, False):
        endpoint = s3_server.endpoint if named else None  # else from the environment
        custom = Connection(StorageConfig(endpoint_url=endpoint, max_attempts=5), quick=False).client.meta.config
        assert custom.retries == {"mode": "standard", "total_max_attempts": 1}, "the retries are our own"
        assert custom.s3["addressing_style"] == "path"
        assert custom.request_checksum_calculation == custom.response_checksum_validation == "when_required"
        assert custom.max_pool_connections >= 2 * MOST_THREADS
        assert (custom.connect_timeout, custom.read_timeout) == (10.0, 60.0)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    amazon = Connection(StorageConfig(), quick=True).client.meta.config
    assert amazon.request_checksum_calculation == "when_supported"
    assert (amazon.s3 or {}).get("addressing_style") is None


def test_a_silent_endpoint_fails_in_seconds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, but never answers
        store = open_store(
            "s3://bucket", StorageConfig(endpoint_url=f"http://127.0.0.1:{deaf.getsockname()[1]}", read_timeout_s=1)
        )
        began = time.perf_counter()
        with pytest.raises(AccessError, match="did not answer"):
            store.preflight()
        assert time.perf_counter() - began < 120


@pytest.mark.parametrize("endpoint", ["nonsense", "http://"])
def test_an_endpoint_that_is_not_a_url_is_an_error(endpoint: str) -> None:
    with pytest.raises(AccessError, match="endpoint_url"):
        open_store("s3://bucket", StorageConfig(endpoint_url=endpoint)).preflight()


@pytest.mark.s3
def test_the_endpoint_may_come_from_the_environment(s3: S3Server) -> None:
    store = open_store(s3.root, StorageConfig())
    store.write("x", b"1")
    assert s3.client().get_object(Bucket=s3.bucket, Key="x")["Body"].read() == b"1"


def test_importing_storage_loads_no_client_library() -> None:
    code = (
        "import sys, pipeline.storage, pipeline.storage.local, pipeline.corpus, pipeline.reader\n"
        "from pipeline.config import StorageConfig\n"
        "pipeline.storage.mark_reached(StorageConfig())\n"
        "pipeline.storage.open_store('/nowhere', StorageConfig()).probe()\n"
        "print([name for name in ('boto3', 'botocore', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"

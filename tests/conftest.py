"""Fixtures of the whole suite: a clean environment, a real S3 server, a second one whose create-only put is atomic.

`s3` starts OpenStack Swift once per session (a few seconds) and never skips: where it cannot start, tests fail and say why. Its address and
keys are in the environment of this process and its children while the session runs.
"""

from __future__ import annotations

import os
import sys
import uuid
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.config import StorageConfig
from tests import forked_decoders
from tests.swift_server import SwiftServer, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

# Before anything imports ray or botocore (nothing above does): no shared cluster, no tokens, no usage statistics, no AWS
# profile of the user, no proxy for loopback.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.pop("RAY_ADDRESS", None)
for _name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
    os.environ.pop(_name, None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Tiny networks gain nothing from threads, and several workers share the cores: threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Without compiled files each process compiles all sources again, 1 s of CPU, and each worker of pytest rewrites all asserts, 10 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

forked_decoders.install()

# Files that take longest, begun first so that no worker is left alone with one at the end. The others follow by name.
LONG_FIRST = (
    "tests/engine/test_ray.py",
    "tests/engine/test_signals.py",
    "tests/model/test_identity.py",
    "tests/engine/test_fault_table.py",
    "tests/engine/test_ray_head.py",
    "tests/engine/test_ray_training.py",
    "tests/model/test_ivvae_full_size.py",
    "tests/pipeline/test_synthetic_videos.py",
    "tests/engine/test_kill.py",
    "tests/chaos/test_chaos.py",
    "tests/engine/test_exactly_once.py",
    "tests/model/test_diffusers_pipeline.py",
    "tests/pipeline/test_training_run.py",
    "tests/model/test_lossless.py",
    "tests/engine/test_faults.py",
    "tests/pipeline/test_storage_outage.py",
    "tests/engine/test_s3.py",
    "tests/pipeline/test_odd_inputs_places.py",
    "tests/test_architecture.py",
    "tests/pipeline/test_delta_log.py",
)

# Files that use one Ray cluster; one worker takes all of them.
ON_ONE_RAY = tuple(
    f"tests/engine/test_ray{name}.py"
    for name in ("", "_faults", "_lanes", "_metrics", "_nodes", "_odd_inputs", "_outage", "_watch")
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadfile` does, with several files as one where they share something costly."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if path in ON_ONE_RAY else path

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the files for workers, which take them one after another (`--dist loadfile --no-loadscope-reorder`)."""
    if hasattr(config, "workerinput"):
        rank = {path: number for number, path in enumerate(LONG_FIRST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With `REQUIRE_CUDA=1` a skipped test of a GPU is a failed one: on a machine that is there for them, none may be left out."""
    outcome: Any = yield
    if os.environ.get("REQUIRE_CUDA") == "1" and item.get_closest_marker("gpu"):
        forbid_skip(outcome.get_result())


def forbid_skip(report: pytest.TestReport) -> None:
    """Turns a skip into a failure that gives its reason."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.longrepr = f"skipped, and REQUIRE_CUDA=1 forbids that: {report.longrepr}"
        report.outcome = "failed"


@dataclass(frozen=True)
class S3Server:
    """Where a server listens and who we are there. `root` is a fresh bucket made for the test that asked."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str = ""

    @property
    def root(self) -> str:
        """`s3://bucket`."""
        return f"s3://{self.bucket}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a relay in front of it."""
        host, _, port = self.endpoint.removeprefix("http://").partition(":")
        return host, int(port)

    def config(self, **fields: Any) -> StorageConfig:
        """A storage section that names this server."""
        return StorageConfig(**{"endpoint_url": self.endpoint, **fields})

    def client(self) -> Any:
        """A boto3 client of the test's own, with short patience."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "total_max_attempts": 3},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def with_fresh_bucket(self) -> S3Server:
        """The same server with an empty bucket of a new name."""
        bucket = f"t-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=bucket)
        return S3Server(self.endpoint, self.access_key, self.secret_key, bucket)

    def environment(self) -> dict[str, str]:
        """What a process needs to find this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """For `pytestmark`: arithmetic of one thread in the whole module, its fixtures included."""
    from tests.threads import one_thread  # imports torch

    with one_thread():
        yield


@pytest.fixture
def fresh_decoders() -> Iterator[None]:
    """Decoder processes are fresh interpreters, as users have them. Otherwise the suite forks them from one that has its imports."""
    with forked_decoders.fresh():
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """OpenStack Swift with s3api, real processes, for the whole session."""
    swift = SwiftServer(tmp_path_factory.mktemp("swift"))
    server = S3Server(swift.endpoint, swift.access_key, swift.secret_key)
    before = {name: os.environ.get(name) for name in server.environment()}
    os.environ.update(server.environment())
    with closing(_Stopper(swift)):
        yield server
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def s3(s3_server: S3Server) -> S3Server:
    """The real S3 server with a fresh bucket for this test."""
    return s3_server.with_fresh_bucket()


@pytest.fixture(scope="session")
def moto_server(s3_server: S3Server) -> Iterator[S3Server]:
    """moto: a mock of S3, but one whose `If-None-Match: *` is atomic. Takes any credentials, so Swift's in the environment do."""
    from tests.moto_server import MotoServer

    with closing(MotoServer(*free_ports(1))) as server:
        yield S3Server(server.endpoint, s3_server.access_key, s3_server.secret_key)


@pytest.fixture
def moto(moto_server: S3Server) -> S3Server:
    """moto with a fresh bucket for this test; name it by `moto.config()`."""
    return moto_server.with_fresh_bucket()


class _Stopper:
    def __init__(self, swift: SwiftServer) -> None:
        self.close = swift.stop

"""One small real Ray cluster for all tests that join one: `ray start --head` on loopback, with a job server."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import forked_command
from tests.swift_server import ACCOUNT, SECRET, USER

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayCluster:
    """Addresses of a running head, the environment its clients need, and its process id."""

    def __init__(self, port: int, dashboard: int, metrics: int, environment: dict[str, str], pid: int) -> None:
        self.pid = pid
        self.address = f"127.0.0.1:{port}"
        self.job_server = f"http://127.0.0.1:{dashboard}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.environment = environment

    def lathe(self, *arguments, **options) -> subprocess.CompletedProcess:
        """A command that finds this cluster's environment, to its end."""
        return forked_command.run(*arguments, env=self.environment, **options)

    def start(self, *arguments, **options) -> forked_command.ForkedCommand:
        """The same, left running."""
        return forked_command.start(*arguments, env=self.environment, **options)

    def encoders(self) -> list[psutil.Process]:
        """Processes of encoder actors on the head's node, oldest first."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (process.cmdline() or [""])[0].startswith("ray::EncoderActor"):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    ray = str(Path(sys.executable).with_name("ray"))
    folder = tmp_path_factory.mktemp("ray")
    port, dashboard, metrics = _free_port(), _free_port(), _free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT),
        # Its workers may need the suite's S3 server, which may not be up yet; jobs name the endpoint.
        **{
            "AWS_ACCESS_KEY_ID": f"{ACCOUNT}:{USER}",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
    environment.pop("RAY_ADDRESS", None)
    hooked = {**environment, "RAY_START_HOOK": "tests.engine.ray_head.prepare"}
    # Unix socket paths are short; pytest's folders may not be.
    temporary = Path("/tmp") / f"lathe-ray-{os.getpid()}"
    start = [
        *(ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        f"--metrics-export-port={metrics}",
        *("--num-cpus=4", "--num-gpus=0", "--object-store-memory=200000000", f"--temp-dir={temporary}"),
        *("--disable-usage-stats", "--no-monitor", "--include-log-monitor=false"),
        f"--dashboard-agent-listen-port={_free_port()}",  # jobs go through it; another Ray of this machine may have the default
    ]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(start, env=hooked, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        for wanted in (port, dashboard):
            while True:
                assert head.poll() is None, (folder / "ray.log").read_text()
                assert time.monotonic() < deadline, "ray did not come up: " + (folder / "ray.log").read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", wanted)) == 0:
                        break
                time.sleep(0.2)
        yield RayCluster(port, dashboard, metrics, environment, head.pid)
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
        shutil.rmtree(temporary, ignore_errors=True)

"""A real S3 server for the tests: OpenStack Swift with its s3api, four small processes on free loopback ports.

Takes a folder on a file system with user extended attributes (ext4, xfs, btrfs; tmpfs from Linux 6.6 on), returns a `SwiftServer` with
endpoint and keys. No root, no memcached. The server processes end when this process ends, also if it is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ACCOUNT, USER, SECRET = "test", "tester", "testing"
START_LIMIT_S = 240.0
RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in (item.split(":") for item in sys.argv[2:]):
    ring = RingBuilder(4, 1, 1)
    ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1"})
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""
BACKEND = """[DEFAULT]
swift_dir = {etc}
devices = {dev}
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY = """[DEFAULT]
swift_dir = {etc}
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:cache]
paste.filter_factory = tests.swift_cache:filter_factory
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
auth_pipeline_check = false
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{tester} = {secret} .admin
"""
PLAIN_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "copy", "slo", "dlo")


class SwiftServer:
    """`endpoint`, `access_key`, `secret_key`; `stop()` ends the processes."""

    def __init__(self, folder: Path) -> None:
        require_attributes(folder)
        self.access_key = f"{ACCOUNT}:{USER}"
        self.secret_key = SECRET
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        names = ("account", "container", "object", "proxy")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['proxy']}"
        self._configure(ports)
        try:
            for name in names:
                self._start(name)
            self._await_health()
        except BaseException:
            self.stop()
            raise

    def _configure(self, ports: dict[str, int]) -> None:
        etc, dev = self._folder / "etc", self._folder / "dev"
        etc.mkdir(parents=True)
        (dev / "d1").mkdir(parents=True)
        (etc / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
            "[storage-policy:0]\nname = gold\ndefault = yes\n"
        )
        values = {"etc": etc, "dev": dev, "user": _user(), "account": ACCOUNT, "tester": USER, "secret": SECRET}
        for name, port in ports.items():
            text = PROXY if name == "proxy" else BACKEND
            config = text.format(name=name, port=port, **values)
            if name == "proxy":
                config += "".join(f"[filter:{part}]\nuse = egg:swift#{part}\n" for part in PLAIN_FILTERS)
            (etc / f"{name}-server.conf").write_text(config)
        rings = [f"{name}:{port}" for name, port in ports.items() if name != "proxy"]
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", RINGS, str(etc), *rings], check=True, env=self._environment()
        )

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        return {**os.environ, "SWIFT_DIR": str(self._folder / "etc"), "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}

    def _start(self, name: str) -> None:
        module = {"object": "obj"}.get(name, name)
        program = f"from swift.{module}.server import main; import sys; sys.argv[0] = 'swift-{name}-server'; main()"
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(self._folder / "etc" / f"{name}-server.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    preexec_fn=_die_with_parent,
                )
            )

    def _await_health(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            dead = [process.args for process in self._processes if process.poll() is not None]
            if dead:
                raise RuntimeError(f"Swift did not start: {dead}\n{self.logs()}")
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthcheck", timeout=20):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"Swift did not answer within {START_LIMIT_S} s\n{self.logs()}")

    def logs(self) -> str:
        """The end of every server's log."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self._folder.glob("*.log")))

    def stop(self) -> None:
        """Ends the processes and waits for them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(timeout=10)


def require_attributes(folder: Path) -> None:
    """Raises RuntimeError where the file system of `folder` cannot hold what Swift stores beside each object."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.setxattr(file.name, "user.swift.metadata", b"x")
        except OSError as error:
            raise RuntimeError(
                f"{folder} has no user extended attributes ({error.strerror}); run pytest with "
                "--basetemp=FOLDER or TMPDIR=FOLDER on ext4, xfs or btrfs"
            ) from None


def free_ports(count: int) -> list[int]:
    """Unused TCP ports of the loopback interface."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _die_with_parent() -> None:
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)

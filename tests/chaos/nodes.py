"""Ray cluster of a head and two more raylets on this machine, whose actors, raylets and nodes are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.swift_server import free_ports

if TYPE_CHECKING:
    from tests.chaos.commands import Commands
    from tests.chaos.schedule import Victim

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
ALIVE = """
import sys
from ray._raylet import GcsClient
print(sum(info.state == 0 for info in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
"""
NODES = 2
START_LIMIT_S = 600.0
VICTIMS: tuple[Victim, ...] = ("driver", "encoder", "decoder_actor", "raylet", "node")
NAMES = {"encoder": "ray::EncoderActor", "decoder_actor": "ray::DecoderActor"}  # of processes
ENGINE = ("encoders=2", "encoder_cpus=1", "decoder_cpus=0.5", "credit=1", "decoders=1")
COMMON = ("--block", "--disable-usage-stats", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=150000000")


class Nodes:
    """`flags`: options of a build on this cluster. `kill` is for `Lifecycle`; `restore` starts nodes in place of those that were killed."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._folder = tempfile.TemporaryDirectory(prefix="lr", dir="/tmp", ignore_cleanup_errors=True)
        # So that workers find the object store. As in the suite, the head has only the processes that are used.
        self._environment = {
            **commands.environment,
            "PYTHONPATH": str(ROOT),
            "RAY_worker_niceness": "0",
            "RAY_START_HOOK": "tests.engine.ray_head.prepare",
        }
        self._port = free_ports(1)[0]
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._head: subprocess.Popen[bytes] | None = None
        settings = (part for text in ENGINE for part in ("--set", f"engine.{text}"))
        self.flags = ("--executor", "ray", "--address", f"127.0.0.1:{self._port}", *settings)
        self.restore()

    def restore(self) -> None:
        """The head and two nodes beside it, each with room for an encoder and its decoder.

        Ray gives a raylet 30 s to start, which is short on a busy machine; one that did not come up is started again.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while self._alive() <= NODES:
            assert time.monotonic() < deadline, f"{self._alive()} raylets came up"
            if self._head is None or self._head.poll() is not None:
                options = (
                    "--head",
                    f"--port={self._port}",
                    "--include-dashboard=false",
                    f"--temp-dir={self._folder.name}",
                )
                self._head = self._start(
                    *options, "--node-ip-address=127.0.0.1", "--no-monitor", "--include-log-monitor=false"
                )
            self._nodes = [node for node in self._nodes if node.poll() is None]
            if self._alive():
                missing = NODES - len(self._nodes)
                self._nodes += [self._start(f"--address=127.0.0.1:{self._port}") for _ in range(missing)]
            time.sleep(1.0)

    def kill(self, victim: Victim, commands: Commands) -> bool:
        """Whether there was one."""
        if victim == "node":
            os.killpg(self._nodes[0].pid, signal.SIGKILL)
            return True
        name = NAMES.get(victim, "raylet")
        found = commands.processes() if victim in NAMES else psutil.Process(self._nodes[0].pid).children(recursive=True)
        for process in found:
            try:
                if name in (process.cmdline() or [""])[0]:
                    process.kill()
                    return True
            except psutil.Error:  # gone
                continue
        return False

    def close(self) -> None:
        """Ends all processes of the cluster."""
        for node in (*self._nodes, self._head):
            if node is not None and node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        self._folder.cleanup()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        with (self._commands.temporary.parent / f"{self._commands.temporary.name}.log").open("ab") as log:
            return subprocess.Popen(
                [RAY, "start", *COMMON, *options],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _alive(self) -> int:
        """Raylets that Ray's head knows to be alive; 0 if it does not answer."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)):
                return 0
        # In a process of its own: Ray ends a process whose head goes away.
        command = [sys.executable, "-c", ALIVE, f"127.0.0.1:{self._port}"]
        counted = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=START_LIMIT_S)
        return int(counted.stdout) if counted.returncode == 0 else 0

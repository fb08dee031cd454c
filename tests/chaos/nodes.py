"""Ray cluster of a head and two more raylets on this machine, whose actors, raylets and nodes are killed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from ray._private import ray_constants
from ray.cluster_utils import Cluster

if TYPE_CHECKING:
    from tests.chaos.ground import Place
    from tests.chaos.schedule import Victim

ROOT = Path(__file__).resolve().parents[2]
NODES = 2
VICTIMS: tuple[Victim, ...] = ("driver", "encoder", "decoder_actor", "raylet", "node")
NAMES = {"encoder": "ray::EncoderActor", "decoder_actor": "ray::DecoderActor"}  # of processes
ENGINE = ("encoders=2", "encoder_cpus=1", "decoder_cpus=0.5", "credit=1")


class Nodes:
    """`flags` lead a build to the cluster. `kill` is a `Life`'s; `restore` replaces nodes that were killed."""

    def __init__(self, place: Place) -> None:
        self._environment = {**place.environment, "PYTHONPATH": str(ROOT)}
        self._place = place
        self._folder = tempfile.TemporaryDirectory(prefix="lr", dir="/tmp", ignore_cleanup_errors=True)
        self._cluster: Any = self._in_environment(
            lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "temp_dir": self._folder.name})
        )
        self.restore()
        settings = (part for text in ENGINE for part in ("--set", f"engine.{text}"))
        self.flags = ("--executor", "ray", "--address", self._cluster.address, *settings)

    def restore(self) -> None:
        """Two nodes beside the head, each with room for an encoder and its decoder."""
        for node in list(self._cluster.worker_nodes):
            if not node.remaining_processes_alive():
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < NODES:
            self._in_environment(lambda: self._cluster.add_node(num_cpus=2))

    def kill(self, victim: Victim, place: Place) -> bool:
        """Whether there was one."""
        if victim == "node":
            node = min(self._cluster.worker_nodes, key=lambda item: item.node_id)
            self._cluster.remove_node(node, allow_graceful=False)
            return True
        if victim == "raylet":
            node = min(self._cluster.worker_nodes, key=lambda item: item.node_id)
            node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.kill()
            return True
        for process in place.processes():
            try:
                if (process.cmdline() or [""])[0].startswith(NAMES[victim]):
                    process.kill()
                    return True
            except psutil.Error:  # gone
                continue
        return False

    def close(self) -> None:
        """Ends all processes of the cluster."""
        self._cluster.shutdown()
        self._folder.cleanup()

    def _in_environment(self, make: Any) -> Any:
        """Ray's processes get the environment of the commands, so that their workers find the object store."""
        before = dict(os.environ)
        os.environ.update(self._environment)
        try:
            return make()
        finally:
            os.environ.clear()
            os.environ.update(before)

"""Whether the encoders and decoders of a job fit on the nodes of a cluster, before any is created. Only `check_placement` asks Ray.

An encoder needs `engine.encoder_cpus` and, on CUDA, one GPU of one node. Each of its decoders needs `engine.decoder_cpus` of any node, by
preference the encoder's. Ray places encoders first: where they take all CPUs, no decoder is ever placed and the build would wait for ever.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray._private.state import state as ray_state

from pipeline.engine.worker.pool import MOST_DECODERS, decoders_per_encoder
from pipeline.errors import ConfigError
from pipeline.units import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.engine.ray.session import Cluster
    from pipeline.engine.worker.build_context import BuildContext

EPSILON = 1e-6  # sums of fractional CPUs


@dataclass(frozen=True, slots=True)
class Node:
    """Resources of a node in total, whether or not they are in use. Bytes of its object store."""

    name: str
    cpus: float
    gpus: float
    store_bytes: float


@dataclass(frozen=True, slots=True)
class Need:
    """What a job asks of a cluster; numbers of CPUs and GPUs for each encoder and each decoder."""

    encoders: int
    encoder_cpus: float
    encoder_gpus: int
    decoders: int  # per encoder
    decoder_cpus: float
    frame_bytes: int  # per encoder, in its node's object store

    def fits(self, nodes: Sequence[Node]) -> tuple[int, int]:
        """Encoders and decoders that can be placed; encoders go where most is free, decoders to what is left."""
        left = [(-node.cpus, -node.gpus) for node in nodes]
        without_gpu = []
        heapq.heapify(left)
        encoders = 0
        while left and encoders < self.encoders and -left[0][0] + EPSILON >= self.encoder_cpus:
            cpus, gpus = heapq.heappop(left)
            if -gpus < self.encoder_gpus:
                without_gpu.append((cpus, gpus))
                continue
            heapq.heappush(left, (cpus + self.encoder_cpus, gpus + self.encoder_gpus))
            encoders += 1
        decoders = sum(int((-cpus + EPSILON) / self.decoder_cpus) for cpus, _ in (*left, *without_gpu))
        return encoders, min(decoders, self.encoders * self.decoders)

    def problem(self, nodes: Sequence[Node]) -> str | None:
        """The arithmetic, where not everything fits; else None."""
        encoders, decoders = self.fits(nodes)
        wanted = self.encoders * self.decoders
        if encoders == self.encoders and decoders == wanted:
            return None
        gpu = f" and {self.encoder_gpus} GPU" if self.encoder_gpus else ""
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        total = self.encoders * self.encoder_cpus + wanted * self.decoder_cpus
        largest = max(nodes, key=lambda node: (node.gpus >= self.encoder_gpus, node.cpus), default=Node("", 0, 0, 0))
        return (
            f"{self.encoders} encoders of {self.encoder_cpus:g} CPU{gpu} and {wanted} decoders of {self.decoder_cpus:g} CPU need "
            f"{total:g} CPU and {self.encoders * self.encoder_gpus} GPU; the {len(nodes)} nodes have {cpus:g} CPU and {gpus:g} GPU, the "
            f"largest {largest.cpus:g} CPU and {largest.gpus:g} GPU, and take {encoders} of these encoders and {decoders} of these decoders"
        )

    def store_problem(self, nodes: Sequence[Node]) -> str | None:
        """The arithmetic, where decoded frames exceed the object store of a node: Ray then writes them to disk, which is slow."""
        for node in nodes:
            by_gpu = node.gpus / self.encoder_gpus if self.encoder_gpus else node.cpus / self.encoder_cpus
            most = min(self.encoders, int(min(by_gpu, node.cpus / self.encoder_cpus)))
            spread = -(-self.encoders // max(1, len(nodes)))
            encoders = min(most, max(1, spread))
            if encoders * self.frame_bytes > node.store_bytes > 0:
                return (
                    f"node {node.name} may hold {encoders} encoders x {size(self.frame_bytes)} of frames (engine.frame_bytes), and its "
                    f"object store has {size(int(node.store_bytes))}: frames beyond it go to disk; lower engine.frame_bytes, or start Ray "
                    "there with a larger --object-store-memory"
                )
        return None


def encoders_for(context: BuildContext, cluster: Cluster) -> int:
    """Number of encoders: as the job says, else one per GPU, else one per node."""
    asked = context.job.engine.encoders
    if context.device.startswith("cuda"):
        return asked or max(1, int(cluster.gpus))
    return asked or (1 if cluster.local else max(1, cluster.nodes))


def decoders_for(context: BuildContext, cluster: Cluster, encoders: int) -> int:
    """Number of decoders per encoder: as the job says, else what fits beside the encoders, at least one."""
    engine = context.job.engine
    if engine.decoders is not None:
        return engine.decoders
    if cluster.local:
        return decoders_per_encoder(None, int(cluster.cores / engine.decoder_cpus), encoders)
    if context.job.decode.device == "cuda":  # beside each encoder on its node
        beside = [(node.cpus / node.gpus - engine.encoder_cpus) / engine.decoder_cpus for node in _nodes() if node.gpus]
        return max(1, min(MOST_DECODERS, int(min(beside, default=1))))
    _, fit = _need(context, encoders, MOST_DECODERS).fits(_nodes())
    return max(1, fit // encoders)


def check_placement(context: BuildContext, cluster: Cluster, encoders: int, decoders: int) -> str | None:
    """A line for the user, or None. Checks the nodes as they are now; a cluster that grows by itself is not refused.

    Raises:
        ConfigError: not all encoders and their `decoders` each can be placed, now or after growing; with the arithmetic.
    """
    need, nodes = _need(context, encoders, decoders), _nodes()
    if (problem := need.problem(nodes)) is None:
        return None if cluster.local else need.store_problem(nodes)
    if not cluster.local and _may_grow():
        return f"{problem}; the cluster may add nodes, so the build begins with what there is"
    raise ConfigError(
        f"engine: {problem}; lower engine.encoders, engine.decoders, engine.encoder_cpus or engine.decoder_cpus, or start when all nodes "
        "have joined"
    )


def encoder_cpus(context: BuildContext, decoders: int) -> float:
    """CPUs that an encoder actor requests: with `decode.device: cuda` those of its decoders as well, which are its child processes."""
    engine = context.job.engine
    return engine.encoder_cpus + (decoders * engine.decoder_cpus if context.job.decode.device == "cuda" else 0)


def _need(context: BuildContext, encoders: int, decoders: int) -> Need:
    engine = context.job.engine
    gpus = 1 if context.device.startswith("cuda") else 0
    of_ray = 0 if context.job.decode.device == "cuda" else decoders
    cpus = encoder_cpus(context, decoders)
    return Need(encoders, cpus, gpus, of_ray, engine.decoder_cpus, engine.frame_bytes)


def _nodes() -> list[Node]:
    return [_node(found) for found in ray.nodes() if found.get("Alive")]


def waiting_line(late: int, encoder_cpus: float, gpus: int, after_s: float) -> str:
    """The line about `late` encoders that have no node after `after_s`."""
    free = ray.available_resources()
    return (
        f"{late} encoders have no node after {after_s:.0f} s; each needs {encoder_cpus:g} CPU and {gpus} GPU, free are "
        f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU; still waiting"
    )


def _node(found: dict[str, object]) -> Node:
    resources = found.get("Resources")
    have = resources if isinstance(resources, dict) else {}
    name = str(found.get("NodeManagerHostname") or found.get("NodeID"))
    return Node(name, have.get("CPU", 0.0), have.get("GPU", 0.0), have.get("object_store_memory", 0.0))


def _may_grow() -> bool:
    """Whether an autoscaler adds nodes. What says so is not a public interface of Ray; without it every cluster may grow."""
    try:
        kv = ray.experimental.internal_kv._internal_kv_get
        enabled = kv(ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY, namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE)
        if enabled == b"1" or ray_state.get_cluster_config() is not None:
            return True
        return grows(kv("__autoscaling_status") or b"{}")
    except AttributeError:
        return True


def grows(status: bytes) -> bool:
    """Whether an autoscaler of version 1 that wrote this status has node types. On a cluster made by hand it only watches, and calls each
    node a type of its own, `node_<id>`.
    """
    report = json.loads(status).get("autoscaler_report") or {}
    types = {*report.get("active_nodes", {}), *(report.get("idle_nodes") or {}), *report.get("pending_launches", {})}
    return any(not name.startswith("node_") for name in types)

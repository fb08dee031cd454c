"""Starting a private Ray or joining a cluster, and leaving it again. The one place that touches Ray's environment.

Enters: the job's address, sizes. Leaves: a connected Ray and what it offers. Rule: an explicit address, else `RAY_ADDRESS` (which
`ray job submit` sets), else a private local Ray; never a stray cluster that happens to run on the machine.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any

from pipeline.config import ray_address_from_environment
from pipeline.errors import AccessError

MiB = 1024 * 1024
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the connected Ray has."""

    local: bool
    cpus: float
    gpus: float
    nodes: int


def connect(address: str | None, *, cpus: float, object_store_bytes: int) -> Cluster:
    """Joins the cluster at `address` or starts a private Ray with `cpus` (logical) and room for frames in flight.

    Raises:
        AccessError: no cluster answers at the address.
    """
    address = address or ray_address_from_environment()
    local = not joins(address)
    _prepare_environment(local=local)
    import ray

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if local:
        ray.init(
            address="local",
            num_cpus=max(1, round(cpus + 0.5)),
            include_dashboard=False,
            object_store_memory=max(object_store_bytes, 80 * MiB),
            **quiet,
        )
    else:
        _check_reachable(str(address))
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())[:200]
            raise AccessError(
                f"engine.address: no Ray cluster answers at {address!r} ({text}); "
                "check the address, or leave it out to run on this machine"
            ) from error
    resources = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node.get("Alive"))
    return Cluster(local, resources.get("CPU", 0.0), resources.get("GPU", 0.0), nodes)


def joins(address: str | None) -> bool:
    """Whether a job with this `engine.address` joins a cluster; else it starts a private Ray."""
    return (address or ray_address_from_environment() or "local") != "local"


def disconnect() -> None:
    """Leaves the cluster; a private one ends."""
    import ray

    ray.shutdown()


def _check_reachable(address: str) -> None:
    """A TCP knock at `[ray://]host:port`: Ray itself keeps trying for minutes. Other forms (`auto`) are Ray's to resolve."""
    host, sep, port = address.removeprefix("ray://").rpartition(":")
    if not sep or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise AccessError(
            f"engine.address: nothing answers at {address!r} ({error}); "
            "check the address, or leave it out to run on this machine"
        ) from None


def _prepare_environment(*, local: bool) -> None:
    # All of these are read when ray is imported or its processes start.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` packs and ships the working folder
    if local:
        os.environ.setdefault("RAY_worker_niceness", "0")  # workers are niced to 15 otherwise
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            # A private token instead of the one Ray would write into the home folder.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

"""Connection to Ray: joins a cluster or starts a private Ray on this machine. The only file that sets Ray's environment variables.

The address is the job's, else `RAY_ADDRESS` (which `ray job submit` sets), else a private Ray is started; a cluster that happens to run on
the machine is never joined. A private Ray keeps its sessions in a `RayFolder`, which is deleted with it.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any

from pipeline.config import ray_address_from_environment
from pipeline.engine.ray.folder import RayFolder
from pipeline.errors import AccessError, BuildError, ConfigError
from pipeline.process import signals
from pipeline.units import size

MiB = 1024 * 1024
LEAST_STORE_BYTES = 80 * MiB
CONNECT_S = 5.0
ABANDON_S = 5.0  # for `ray.shutdown` without a head
SHM = "/dev/shm"
REINSTALL_S = 0.05  # between two calls of `signals.reinstall` while Ray starts


@dataclass(frozen=True, slots=True)
class Cluster:
    """Resources of the connected Ray."""

    local: bool
    cpus: float
    gpus: float
    nodes: int
    cores: int = os.cpu_count() or 1  # of this machine


def connect(address: str | None, *, cpus: float, object_store_bytes: int) -> Cluster:
    """Joins the cluster at `address`, or starts a private Ray with `cpus` (logical) and an object store of `object_store_bytes`.

    Raises:
        AccessError: no cluster answers at the address.
        ConfigError: shared memory is too small for the object store of a private Ray.
        BuildError: a private Ray does not start.
        KeyboardInterrupt: a signal came while it started.
    """
    address = address or ray_address_from_environment()
    local = not joins(address)
    _prepare_environment(local=local)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if local:
        object_store_bytes = max(object_store_bytes, LEAST_STORE_BYTES)
        if object_store_bytes > LEAST_STORE_BYTES:  # frames pass through it
            check_shared_memory(object_store_bytes)
        options |= {
            "address": "local",
            "num_cpus": max(1, round(cpus + 0.5)),
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
        }
        _start_private(options)
    else:
        _check_reachable(str(address))
        try:
            _connections.append(_Connection({"address": address, **options}, None))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise AccessError(
                f"engine.address: no Ray cluster answers at {address!r} ({_line(error)}); "
                "check the address, or leave it out to run on this machine"
            ) from error
    try:
        signals.check()
        import ray

        resources = ray.cluster_resources()
        nodes = sum(1 for node in ray.nodes() if node.get("Alive"))
    except BaseException:
        disconnect()
        raise
    return Cluster(local, resources.get("CPU", 0.0), resources.get("GPU", 0.0), nodes)


def check_shared_memory(needed_bytes: int, folder: str = SHM) -> None:
    """Frames travel through shared memory. Where it is too small, Ray takes a folder on a disk instead, which is slow and may fill up.

    Raises:
        ConfigError: `folder` has fewer than `needed_bytes` free.
    """
    if not os.path.isdir(folder):  # not Linux: Ray does not use it
        return
    usage = shutil.disk_usage(folder)
    if usage.free >= needed_bytes:
        return
    raise ConfigError(
        f"engine.frame_bytes: frames of all encoders need {size(needed_bytes)} of shared memory, and {folder} has {size(usage.free)} free "
        f"of {size(usage.total)}; enlarge it (docker run --shm-size={-(-needed_bytes // (1024 * MiB))}g), lower engine.frame_bytes or "
        "engine.encoders, or use --executor inline"
    )


def joins(address: str | None) -> bool:
    """Whether a job with this `engine.address` joins a cluster; else it starts a private Ray."""
    return (address or ray_address_from_environment() or "local") != "local"


def disconnect() -> None:
    """Leaves the cluster. A private Ray ends, with its processes and its folder. A second call does nothing."""
    while _connections:
        _connections.pop().close()


def abandon() -> None:
    """Ray's head is away, so Ray cannot be left in good order: `disconnect` and the end of the process no longer wait for it.

    Ray's processes on this machine end with this process; those of a cluster are ended by the cluster.
    """
    import ray

    _abandoned.set()
    atexit.unregister(ray.shutdown)


class _Connection:
    """Ray, initialised and shut down by a thread that lives as long as the connection.

    Not by the main thread: a signal there could interrupt `ray.init`. The thread must live on because the kernel ends Ray's processes when
    the thread that started them ends (PR_SET_PDEATHSIG); so a killed driver leaves none. `ray.init` installs, from any thread, a native
    handler of SIGTERM that aborts the process; the main thread installs ours again, also while it waits.
    """

    def __init__(self, options: dict[str, Any], folder: RayFolder | None) -> None:
        """Raises what `ray.init` raises."""
        self._options = options
        self._folder = folder
        self._error: BaseException | None = None
        self._up = threading.Event()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._own, name="ray", daemon=True)
        with signals.deferred():  # a Ray that is starting cannot be shut down cleanly; a second signal does not wait
            self._thread.start()
            try:
                while not self._up.wait(REINSTALL_S):
                    signals.reinstall()
            except BaseException:
                self._leave.set()  # shut down as soon as it is up
                raise
            signals.reinstall()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def close(self) -> None:
        self._leave.set()
        self._thread.join(ABANDON_S if _abandoned.is_set() else None)
        signals.reinstall()  # `ray.shutdown` leaves the default action of SIGTERM
        if self._folder is not None:
            self._folder.close()

    def _own(self) -> None:
        try:
            import ray

            ray.init(**self._options)
        except BaseException as error:  # noqa: BLE001 - raised in the constructor; Ray raises bare Exceptions
            self._error = error
        finally:
            self._up.set()
        if self._error is None:
            self._leave.wait()
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()


_abandoned = threading.Event()
_connections: list[_Connection] = []  # of this process: at most one, a limit of Ray


def _start_private(options: dict[str, Any]) -> None:
    """Two tries: a busy machine may need more time than Ray gives itself."""
    for last in (False, True):
        folder = RayFolder()
        try:
            _connections.append(_Connection({**options, "_temp_dir": folder.path}, folder))
        except Exception as error:
            where = f"{folder.path} with {size(folder.free_bytes)} free"
            folder.close()  # its processes have ended with the thread that started them
            if last or signals.requested():
                raise BuildError(
                    f"a private Ray did not start on this machine ({_line(error)}); its temporary folder was {where}; free space there, "
                    "set TMPDIR, run when the machine is less busy, or use --executor inline"
                ) from error
        except BaseException:
            folder.close()
            raise
        else:
            return


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_reachable(address: str) -> None:
    """Tries a TCP connection to `[ray://]host:port`: Ray itself would retry for minutes. Ray resolves other forms (`auto`)."""
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
    # Ray reads these when it is imported or starts its processes.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` packs and ships the working folder
    if local:
        os.environ.setdefault("RAY_worker_niceness", "0")  # workers are niced to 15 otherwise
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            # A private token instead of the one Ray would write into the home folder.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

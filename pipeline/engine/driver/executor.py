"""`Executor`: where a build runs. Connects to Ray if the job says so, resolves device and network, makes the worker pool."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline import encoder as encoder
from pipeline.engine.worker.pool import InlinePool, WorkerPool
from pipeline.errors import ConfigError, StorageUnavailable
from pipeline.process.scratch import ScratchFolder

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.driver.observer import Meters
    from pipeline.engine.worker.build_context import BuildContext


class Executor:
    """See the module. The network is identified in a thread of its own from the start."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._cluster: Any = None
        self._network: Future[encoder.Network] = Future()
        # A daemon thread: a signal must end the process although the store of the checkpoint does not answer.
        threading.Thread(target=self._identify, name="identify", daemon=True).start()

    def __enter__(self) -> Executor:
        return self

    def connect(self) -> None:
        """Starts a private Ray or joins the job's cluster; does nothing the second time, or for the inline executor."""
        if self._job.engine.executor == "ray" and self._cluster is None:
            from pipeline.engine.ray import session as ray_session

            self._cluster = ray_session.connect(
                self._job.engine.address,
                cpus=_local_cpus(self._job),
                object_store_bytes=(self._job.engine.encoders or 1) * self._job.engine.frame_bytes * 5 // 4,
            )

    def __exit__(self, *exc: object) -> None:
        if self._cluster is not None:
            from pipeline.engine.ray import session as ray_session

            ray_session.disconnect()
            if self._cluster.local:
                # Deletes the folders of actors that were killed. A full disk must not replace the build's own result.
                with suppress(StorageUnavailable):
                    ScratchFolder().close()

    @property
    def joins(self) -> bool:
        """Whether encoders run on a cluster that exists already."""
        if self._job.engine.executor != "ray":
            return False
        from pipeline.engine.ray import session as ray_session

        return ray_session.joins(self._job.engine.address)

    def network(self) -> encoder.Network:
        """Identity of the job's network. Raises the errors of its checkpoint."""
        return self._network.result()

    def _identify(self) -> None:
        try:
            self._network.set_result(encoder.identify(self._job.model, moments=self._job.write.moments))
        except BaseException as error:  # noqa: BLE001 - raised by network()
            self._network.set_exception(error)

    def resolve_device(self) -> tuple[str, str]:
        """Device and compute dtype of the encoders.

        Raises:
            ConfigError: CUDA was asked for, and this machine, which runs the encoders, has none.
        """
        config = self._job.model
        if config.device == "auto" and self.joins:
            self.connect()  # only the cluster knows what `auto` means
        cluster = self._cluster
        cuda = cluster.gpus >= 1 if cluster is not None else encoder.cuda_available()
        device, dtype = encoder.resolve_device(config.device, config.compute_dtype, cuda=cuda)
        # A joined cluster may add GPU nodes when encoders ask for them.
        if device.startswith("cuda") and not cuda and not self.joins:
            raise ConfigError(
                f"model.device: {device} was asked for, and this machine has no CUDA device; use cpu or auto"
            )
        return device, dtype

    def encoder_cores(self) -> float:
        """CPU cores of all encoders together: of the cluster, or of this machine."""
        if self.joins:
            self.connect()
            return float(self._cluster.cpus)
        return float(os.cpu_count() or 1)

    def notices(self) -> list[str]:
        """Lines for the user about the cluster."""
        if self._cluster is None or self._cluster.local or self._cluster.gpus or self._job.model.device != "auto":
            return []
        return ["the cluster has no GPU at the moment, so encoders run on CPU; use --device cuda to wait for GPUs"]

    def meters(self) -> Meters | None:
        """Exporter of the driver's Prometheus series; None where the build does not run on Ray."""
        if self._cluster is None:
            return None
        from pipeline.engine.ray.metrics import Meters as RayMeters

        return RayMeters("driver")

    def pool(self, context: BuildContext) -> WorkerPool:
        """The workers, not started."""
        if self._cluster is None:
            return InlinePool(context)
        from pipeline.engine.ray.pool import RayPool

        return RayPool(context, self._cluster)


def _local_cpus(job: EncodeJob) -> float:
    """Logical CPUs a private Ray needs so that every actor of the job is placed at once."""
    cores = os.cpu_count() or 1
    encoders = job.engine.encoders or 8
    decoders = job.engine.decoders or cores
    return encoders * job.engine.encoder_cpus + max(cores, encoders * decoders) * job.engine.decoder_cpus

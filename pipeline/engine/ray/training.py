"""Training run on several GPUs or machines, by Ray Train.

Takes a prepared job, returns the folder of weights. Each worker runs `pipeline.training.run.learn` in torch's process group. When one dies,
or fails in a way that may pass, Ray Train starts all of them again, and the run resumes from the folder's last checkpoint. Errors that
would repeat (a wrong recipe or checkpoint, a loss that is not finite) end the run.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.ray.session import Cluster, connect, disconnect
from pipeline.errors import ConfigError, FatalError, LatheError, TrainingError
from pipeline.training.run import definite_device, learn

if TYPE_CHECKING:
    from pipeline.training.job import TrainJob
    from pipeline.training.progress_log import ProgressLog
    from pipeline.training.run import PreparedRun

MiB = 1024 * 1024


class StepChannel:
    """Actor that passes logged steps from the first worker to the driver, and keeps the error that ends the run."""

    def __init__(self) -> None:
        self._steps: asyncio.Queue[tuple[int, dict[str, float]] | None] = asyncio.Queue()
        self._fatal: LatheError | None = None

    async def put(self, step: int, values: dict[str, float]) -> None:
        """A logged step."""
        await self._steps.put((step, values))

    async def get(self) -> tuple[int, dict[str, float]] | None:
        """The next logged step; None after `end`."""
        return await self._steps.get()

    async def end(self) -> None:
        """No further step follows."""
        await self._steps.put(None)

    async def fail(self, error: LatheError) -> None:
        """Keeps the first error that would repeat."""
        self._fatal = self._fatal or error

    async def fatal(self) -> LatheError | None:
        """That error, if there was one."""
        return self._fatal


def train(prepared: PreparedRun, progress_log: ProgressLog) -> Path:
    """Runs `prepared` on `job.workers` processes of a cluster, or of a private Ray.

    Raises:
        ConfigError: Ray Train is not installed; more GPUs or CPUs than a private Ray has.
        AccessError: no cluster answers.
        TrainingError: processes died more often than `restarts` allows.
        FatalError: what `learn` raised in a worker.
    """
    job = prepared.job
    cluster = connect(job.address, cpus=job.workers * job.worker_cpus, object_store_bytes=80 * MiB)
    try:
        return _fit(prepared, progress_log, use_gpu=_gpus(job, cluster))
    finally:
        disconnect()


def _gpus(job: TrainJob, cluster: Cluster) -> bool:
    """Whether each worker gets a GPU.

    Raises:
        ConfigError: this machine has fewer GPUs than workers. A cluster may still add some, so it is not checked.
    """
    wanted = job.device == "cuda" or (job.device == "auto" and cluster.gpus > 0)
    if wanted and cluster.local and cluster.gpus < job.workers:
        raise ConfigError(
            f"workers: {job.workers} were asked for, each with a GPU, and this machine has {cluster.gpus:g}; ask for fewer, or for "
            "device: cpu"
        )
    return wanted


def _fit(prepared: PreparedRun, progress_log: ProgressLog, *, use_gpu: bool) -> Path:
    import ray

    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError as error:
        raise ConfigError(
            f"workers: more than one process runs through Ray Train, which is not fully installed ({error}); pip install 'lathe[training]'"
        ) from error
    job = prepared.job
    channel = ray.remote(num_cpus=0)(StepChannel).remote()
    scratch = prepared.folder / "ray"
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "prepared": ray.put(prepared),
            "channel": channel,
            "device": "cuda" if use_gpu else "cpu",
            "here": os.getcwd(),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=use_gpu, resources_per_worker=_resources(job, use_gpu=use_gpu)
        ),
        # A new name: Ray Train would restore the state of a run it knows, and the run's state is in its folder.
        run_config=RunConfig(
            name=uuid.uuid4().hex, storage_path=str(scratch), failure_config=FailureConfig(max_failures=job.restarts)
        ),
    )
    listener = threading.Thread(target=_listen, args=(channel, progress_log), daemon=True)
    listener.start()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        _raise_fatal(channel)
        raise TrainingError(_why(error, job)) from error
    finally:
        ray.get(channel.end.remote())
        listener.join()
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_fatal(channel)
    return prepared.folder / "weights"


def _resources(job: TrainJob, *, use_gpu: bool) -> dict[str, float]:
    return {"CPU": job.worker_cpus} | ({"GPU": 1.0} if use_gpu else {})


def _work(config: dict[str, Any]) -> None:
    """One worker. An error that would repeat is sent to the driver and ends all workers."""
    import ray

    channel = config["channel"]
    if ray.get(channel.fatal.remote()) is not None:
        return
    prepared: PreparedRun = ray.get(config["prepared"])
    if os.path.isdir(config["here"]):
        os.chdir(config["here"])  # relative names are those of the driver's folder

    def log_step(step: int, values: Mapping[str, float]) -> None:
        ray.get(channel.put.remote(step, dict(values)))

    try:
        learn(prepared, definite_device(config["device"]), log_step)
    except FatalError as error:
        ray.get(channel.fail.remote(error))
        raise


def _listen(channel: Any, progress_log: ProgressLog) -> None:
    """Passes logged steps to `progress_log`, in a thread of the driver."""
    import ray

    while (step := ray.get(channel.get.remote())) is not None:
        progress_log.step(*step)


def _raise_fatal(channel: Any) -> None:
    import ray

    if (error := ray.get(channel.fatal.remote())) is not None:
        raise error


def _why(error: Any, job: TrainJob) -> str:
    failures = getattr(error, "worker_failures", {}) or {0: error}
    rank, last = next(iter(failures.items()))
    words = " ".join(str(last).split())
    return f"worker {rank} failed {job.restarts + 1} times in all ({words[-400:]}); the same command resumes from the last checkpoint"

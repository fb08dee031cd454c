"""A training run on several GPUs or machines, through Ray Train.

Enters: a job that was prepared here. Leaves: the folder of weights. Each worker runs `pipeline.training.run.learn` in torch's process
group; when one dies, Ray Train starts all of them again, and the run goes on from the folder's last checkpoint, as it would after any kill.
What would fail again the same way (a recipe, a checkpoint, a loss that is not finite) is not tried again.
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
    """An actor between the first worker and the driver: steps on their way, and the error that ends the run."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[tuple[int, dict[str, float]] | None] = asyncio.Queue()
        self._fatal: LatheError | None = None

    async def say(self, step: int, values: dict[str, float]) -> None:
        """A logged step."""
        await self._told.put((step, values))

    async def hear(self) -> tuple[int, dict[str, float]] | None:
        """The next logged step; None after `hush`."""
        return await self._told.get()

    async def hush(self) -> None:
        """Nothing more will be said."""
        await self._told.put(None)

    async def fail(self, error: LatheError) -> None:
        """The first error that trying again would not cure."""
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
        LatheError: what `learn` raised in a worker.
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
        ConfigError: a machine that cannot have as many; a cluster may still grow, so it is waited for.
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
    ear = ray.remote(num_cpus=0)(StepChannel).remote()
    scratch = prepared.folder / "ray"
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "prepared": ray.put(prepared),
            "ear": ear,
            "device": "cuda" if use_gpu else "cpu",
            "here": os.getcwd(),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=use_gpu, resources_per_worker=_resources(job, use_gpu=use_gpu)
        ),
        # A name of its own: Ray Train would take up the state of a run it knows, and ours is in the folder.
        run_config=RunConfig(
            name=uuid.uuid4().hex, storage_path=str(scratch), failure_config=FailureConfig(max_failures=job.restarts)
        ),
    )
    listener = threading.Thread(target=_listen, args=(ear, progress_log), daemon=True)
    listener.start()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        _raise_told(ear)
        raise TrainingError(_why(error, job)) from error
    finally:
        ray.get(ear.hush.remote())
        listener.join()
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_told(ear)
    return prepared.folder / "weights"


def _resources(job: TrainJob, *, use_gpu: bool) -> dict[str, float]:
    return {"CPU": job.worker_cpus} | ({"GPU": 1.0} if use_gpu else {})


def _work(config: dict[str, Any]) -> None:
    """A worker. One that would fail again the same way says so and stops all."""
    import ray

    ear = config["ear"]
    if ray.get(ear.fatal.remote()) is not None:
        return
    prepared: PreparedRun = ray.get(config["prepared"])
    if os.path.isdir(config["here"]):
        os.chdir(config["here"])  # relative names mean what they mean where the command was given

    def say(step: int, values: Mapping[str, float]) -> None:
        ray.get(ear.say.remote(step, dict(values)))

    try:
        learn(prepared, definite_device(config["device"]), say)
    except FatalError as error:
        ray.get(ear.fail.remote(error))
        raise


def _listen(ear: Any, progress_log: ProgressLog) -> None:
    """Hands on what workers say, in a thread of the driver."""
    import ray

    while (told := ray.get(ear.hear.remote())) is not None:
        progress_log.step(*told)


def _raise_told(ear: Any) -> None:
    import ray

    if (error := ray.get(ear.fatal.remote())) is not None:
        raise error


def _why(error: Any, job: TrainJob) -> str:
    failures = getattr(error, "worker_failures", {}) or {0: error}
    rank, last = next(iter(failures.items()))
    words = " ".join(str(last).split())
    return f"worker {rank} failed {job.restarts + 1} times in all ({words[-400:]}); the same command goes on from the last checkpoint"

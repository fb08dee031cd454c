"""Training job in this process: checks, preparation, and the run.

`prepare` finds errors before anything starts; `learn` runs the training, also in each process of Ray Train.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import (
    AccessError,
    CheckpointError,
    ConfigError,
    LatheError,
    StorageUnavailable,
    TrainingError,
    WorkerLost,
)
from pipeline.process import kill_points as drill
from pipeline.storage import local_path
from pipeline.training.data_record import DataRecord
from pipeline.training.job import recipe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from model.metrics.perceptual import LPIPS
    from model.training.recipe import TrainingRecipe
    from model.training.source import ClipSource
    from pipeline.training.job import TrainJob
    from pipeline.training.progress_log import ProgressLog
    from pipeline.training.unusable import Unusable

    OnStep = Callable[[int, Mapping[str, float]], None]

ERRNO = re.compile(r"\[Errno (\d+)\]")
WRAPPED = "Caught "  # start of an error text of torch's loaders, followed by the traceback


@dataclass(frozen=True)
class PreparedRun:
    """Run that can start or continue. Pickles."""

    job: TrainJob
    recipe: TrainingRecipe
    source: ClipSource
    folder: Path
    done: int  # steps already done by an earlier run
    unusable: Unusable | None  # of a corpus


def prepare(job: TrainJob, progress_log: ProgressLog) -> PreparedRun:
    """Finds everything that can be wrong before a network exists; creates the folder and indexes the corpus.

    Raises:
        ConfigError: an impossible recipe, folder or size, or a folder with a run in progress; says which.
        InputError: inputs that match nothing, compressed tars, a corpus without a usable clip.
        OutputError: a folder that cannot be written.
    """
    from pipeline.encoder.network import load_torch

    load_torch()  # before anything else imports torch: its idle threads then sleep and leave the cores to the loaders
    from model.training.run_folder import RunFolder

    recipe = recipe_of(job)
    files = RunFolder(os.path.abspath(local_path(job.output)))
    with ExitStack() as stack:
        try:
            files.prepare(recipe)
            stack.enter_context(files.locked())  # data.json and corpus/ belong to the run in progress, if there is one
            done = files.last_step()
        except ValueError as error:
            raise ConfigError(f"output: {error}") from None
        except OSError as error:
            raise ConfigError(f"output: {job.output} cannot be a run's folder: {error.strerror}") from None
        progress_log.begin(recipe.steps)
        if done:
            progress_log.notice(f"{job.output} holds {done} of {recipe.steps} steps; continuing from there")
        else:
            progress_log.notice(f"{recipe.steps} steps of {recipe.network} into {job.output}")
        record = DataRecord(files.path / "data.json", job)
        if record.changes:
            progress_log.notice(
                f"data has changed since this run started ({'; '.join(record.changes.values())}); the run continues with the new one"
            )
        source, unusable = _source(job, recipe, files.path, progress_log, anew=not done or record.clips_changed)
        record.write()
    return PreparedRun(job, recipe, source, files.path, done, unusable)


def learn(prepared: PreparedRun, device: str, on_step: OnStep) -> Path:
    """Runs the training, or this process's part of it if there is a process group. Returns FOLDER/weights.

    Raises:
        ConfigError: a recipe that does not fit this machine or this number of processes.
        CheckpointError: initial weights that are missing or do not fit.
        TrainingError: the run started and failed, and would fail again as it is; its last checkpoint is usable.
        WorkerLost, StorageUnavailable: a loading process was killed, or a disk failed; the same command continues from the last
            checkpoint.
    """
    from model.training.trainer import train

    job = prepared.job
    lpips = _lpips(job)

    def report(step: int, values: Mapping[str, float]) -> None:
        on_step(step, values)
        drill.fire(job.drill, "in_training")

    try:
        return train(
            prepared.recipe,
            prepared.source,
            prepared.folder,
            device=device,
            loaders=job.loaders,
            lpips=lpips,
            on_step=report,
        )
    except FloatingPointError as error:
        raise TrainingError(str(error)) from error
    except LatheError as error:
        raise _without_traceback(error) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(_last_words(error)) from error
    except OSError as error:
        # `model.checkpoint` raises these without errno for the weights a run starts from
        start = isinstance(error, FileNotFoundError | PermissionError | ConnectionError) and error.errno is None
        if start and not str(error).startswith(WRAPPED):
            kind = AccessError if isinstance(error, ConnectionError) else CheckpointError
            raise kind(f"start: {error}") from error
        raise _failed_io(error, prepared.folder) from error
    except RuntimeError as error:
        if (known := _known_failure(error)) is None:
            raise
        raise known from error


def definite_device(device: str) -> str:
    """Resolves `auto` for this process.

    Raises:
        ConfigError: CUDA requested without a CUDA device.
    """
    from pipeline.encoder.network import cuda_available

    available = cuda_available()
    if device == "cuda" and not available:
        raise ConfigError("device: cuda was requested, but torch finds no CUDA device; use cpu or auto")
    return "cuda" if available and device != "cpu" else "cpu"


def _source(
    job: TrainJob, recipe: TrainingRecipe, folder: Path, progress_log: ProgressLog, *, anew: bool
) -> tuple[ClipSource, Unusable | None]:
    """Source of clips. `anew`: other clips are drawn than before, so videos without a clip are listed again."""
    data = job.data
    if data.synthetic is not None:
        from pipeline.synthetic_videos.source import SyntheticSource

        return SyntheticSource(data.synthetic.seed), None
    from pipeline.corpus import PassedOver, resolve_inputs
    from pipeline.training.corpus_index import corpus_index
    from pipeline.training.corpus_source import CorpusSource
    from pipeline.training.unusable import Unusable

    shards = resolve_inputs(data.inputs or (), job.storage, passed_over := PassedOver())
    if passed_over:
        progress_log.notice(passed_over.line())
    corpus_folder = folder / "corpus"
    corpus_folder.mkdir(exist_ok=True)
    unusable = Unusable(corpus_folder / "unusable.jsonl")
    index = corpus_index(
        shards, corpus_folder / "index.parquet", job.storage, job.decode, unusable, progress_log.notice
    )
    if anew:
        unusable.clear_clips()
    source = CorpusSource(index, data, job.decode, job.storage, unusable)
    groups = {
        (stage.source_frames(group), group.height, group.width) for stage in recipe.stages for group in stage.groups
    }
    source.check(sorted(groups))
    progress_log.notice(f"{len(source)} videos")
    return source, unusable


def _lpips(job: TrainJob) -> LPIPS | None:
    if job.lpips is None:
        return None
    from model.metrics.perceptual import load_lpips

    try:
        return load_lpips(job.lpips.features, job.lpips.heads)
    except ConnectionError as error:
        raise AccessError(f"lpips: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"lpips: {error}") from error


def _without_traceback(error: LatheError) -> LatheError:
    """Removes the traceback that a loading process puts around its error's message."""
    if error.message.startswith(WRAPPED):
        error.message = _last_words(error)
        error.args = (error.message, *error.args[1:])
    return error


def _last_words(error: Exception) -> str:
    """Message of an error without the traceback that torch's loaders wrap around it."""
    text = str(error)
    if not text.startswith(WRAPPED):
        return text
    return text.strip().rpartition(f"{type(error).__name__}: ")[2]


def _failed_io(error: OSError, folder: Path) -> LatheError:
    """Error for one of the operating system, in this process or a loading process."""
    from pipeline.storage.local_errors import PASSING

    text = f"{folder}: {_last_words(error)}; the same command continues from the last checkpoint"
    if isinstance(error, ChildProcessError):  # of `decoder_process`
        return WorkerLost(text)
    found = ERRNO.search(text)  # torch's loaders keep the class and the text of an error, not its number
    number = int(found[1]) if found else error.errno
    return StorageUnavailable(text) if number in PASSING else TrainingError(text)


def _known_failure(error: RuntimeError) -> LatheError | None:
    """Error for failures of torch that users can act on; None for all others, which are bugs."""
    from model.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return TrainingError(
            "training ran out of memory; use smaller batches in the recipe (and more of them per step), or recompute: true"
        )
    if str(error).startswith("DataLoader worker"):
        return WorkerLost(
            f"{_last_words(error)}; a loading process died, most likely from lack of memory. The same command continues from the last "
            "checkpoint; data.cache_bytes and loaders limit the memory of loading"
        )
    return None

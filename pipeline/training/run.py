"""A training job in this process: what it means, whether it can be, and the run itself.

Enters: a `TrainJob`. Leaves: the folder of weights, or an error of `pipeline.errors`. `prepare` finds what is wrong before anything starts;
`learn` is also what each process of Ray Train does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, CheckpointError, ConfigError, LatheError, TrainingError
from pipeline.process import kill_points as drill
from pipeline.storage import local_path
from pipeline.training.job import recipe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from model.training.perceptual import LPIPS
    from model.training.recipe import TrainingRecipe
    from model.training.source import ClipSource
    from pipeline.training.job import TrainJob
    from pipeline.training.progress_log import ProgressLog
    from pipeline.training.unusable import Unusable

    OnStep = Callable[[int, Mapping[str, float]], None]

WRAPPED = "Caught "  # how torch's loaders begin the text of an error of theirs, before its traceback


@dataclass(frozen=True)
class Prepared:
    """A run that can begin, or go on. Pickles."""

    job: TrainJob
    recipe: TrainingRecipe
    source: ClipSource
    folder: Path
    done: int  # steps of an earlier run that it goes on from
    unusable: Unusable | None  # of a corpus


def prepare(job: TrainJob, progress_log: ProgressLog) -> Prepared:
    """Everything that can be wrong before a network exists; makes the folder and indexes the corpus.

    Raises:
        ConfigError: recipe, folder or sizes that cannot be; says which.
        InputError: inputs that match nothing, compressed tars, a corpus without a usable clip.
        OutputError: a folder that cannot be written.
    """
    from pipeline.encoder.network import load_torch

    load_torch()  # before anything else does: its idle threads sleep, and leave the cores to the loaders
    from model.training.run_folder import RunFolder

    recipe = recipe_of(job)
    files = RunFolder(os.path.abspath(local_path(job.output)))
    try:
        files.begin(recipe)
        done = files.last_step()
    except ValueError as error:
        raise ConfigError(f"output: {error}") from None
    except OSError as error:
        raise ConfigError(f"output: {job.output} cannot be a run's folder: {error.strerror}") from None
    progress_log.begin(recipe.steps)
    if done:
        progress_log.notice(f"{job.output} holds {done} of {recipe.steps} steps; going on from there")
    else:
        progress_log.notice(f"{recipe.steps} steps of {recipe.network} into {job.output}")
    _remember_data(job, files.path, progress_log)
    source, unusable = _source(job, recipe, files.path, progress_log)
    return Prepared(job, recipe, source, files.path, done, unusable)


def learn(prepared: Prepared, device: str, on_step: OnStep) -> Path:
    """The run, or this process's part of it where a process group was begun. Leaves FOLDER/weights.

    Raises:
        ConfigError: a recipe that cannot be on this machine, or with so many processes.
        CheckpointError: weights it begins with that are not there or do not fit.
        TrainingError: it began and failed; the same command goes on from the last checkpoint.
    """
    from model.training.trainer import train

    job = prepared.job
    lpips = _lpips(job)

    def told(step: int, values: Mapping[str, float]) -> None:
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
            on_step=told,
        )
    except FloatingPointError as error:
        raise TrainingError(str(error)) from error
    except LatheError as error:
        raise _without_traceback(error) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(_last_words(error)) from error
    except OSError as error:
        if (
            isinstance(error, FileNotFoundError) and error.errno is None
        ):  # of `model.checkpoint`: what the run starts from
            raise CheckpointError(f"start: {error}") from error
        raise TrainingError(f"{prepared.folder}: {error}; the same command goes on from the last checkpoint") from error
    except RuntimeError as error:
        if (known := _told(error)) is None:
            raise
        raise TrainingError(known) from error


def definite_device(device: str) -> str:
    """`auto` made definite for this process.

    Raises:
        ConfigError: CUDA asked for where there is none.
    """
    from pipeline.encoder.network import cuda_available

    there = cuda_available()
    if device == "cuda" and not there:
        raise ConfigError("device: cuda was asked for, but this process sees no CUDA device; use cpu or auto")
    return "cuda" if there and device != "cpu" else "cpu"


def _remember_data(job: TrainJob, folder: Path, progress_log: ProgressLog) -> None:
    """Keeps with the run where its clips come from, and says where that is not what it began with: what goes on is another run then."""
    wanted = job.data.model_dump(mode="json", exclude={"cache_bytes"})
    path = folder / "data.json"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key}: was {begun.get(key)!r}, is {value!r}" for key, value in wanted.items() if begun.get(key) != value
        ]
        if not changed:
            return
        progress_log.notice(f"data is not what this run began with ({'; '.join(changed)}): it goes on with the new one")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    partial.replace(path)


def _source(
    job: TrainJob, recipe: TrainingRecipe, folder: Path, progress_log: ProgressLog
) -> tuple[ClipSource, Unusable | None]:
    data = job.data
    if data.synthetic is not None:
        from model.training.source import SyntheticSource

        return SyntheticSource(data.synthetic.seed), None
    from pipeline.corpus import PassedOver, resolve_inputs
    from pipeline.training.corpus_index import corpus_index
    from pipeline.training.corpus_source import CorpusSource
    from pipeline.training.unusable import Unusable

    shards = resolve_inputs(data.inputs or (), job.storage, passed_over := PassedOver())
    if passed_over:
        progress_log.notice(passed_over.line())
    place = folder / "corpus"
    place.mkdir(exist_ok=True)
    unusable = Unusable(place / "unusable.jsonl")
    index = corpus_index(shards, place / "index.parquet", job.storage, job.decode, unusable, progress_log.notice)
    source = CorpusSource(index, data, job.decode, job.storage, unusable)
    groups = {(group.frames, group.height, group.width) for stage in recipe.stages for group in stage.groups}
    source.check(sorted(groups))
    progress_log.notice(f"{len(source)} videos")
    return source, unusable


def _lpips(job: TrainJob) -> LPIPS | None:
    if job.lpips is None:
        return None
    from model.training.perceptual import load_lpips

    try:
        return load_lpips(job.lpips.features, job.lpips.heads)
    except RuntimeError as error:  # the hub
        raise AccessError(f"lpips: {error}") from error
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"lpips: {error}") from error


def _without_traceback(error: LatheError) -> LatheError:
    """An error of a loading process comes as the text of its traceback; this is the error it was."""
    if error.message.startswith(WRAPPED):
        error.message = _last_words(error)
        error.args = (error.message, *error.args[1:])
    return error


def _last_words(error: Exception) -> str:
    """What an error said, without the traceback that torch's loaders wrap around it."""
    text = str(error)
    if not text.startswith(WRAPPED):
        return text
    return text.strip().rpartition(f"{type(error).__name__}: ")[2]


def _told(error: RuntimeError) -> str | None:
    """Failures of torch's own that have a name for users; None for all others, which are bugs."""
    from model.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return "training ran out of memory; use smaller batches in the recipe (with more of them a step), or recompute: true"
    if str(error).startswith("DataLoader worker"):
        return (
            f"{_last_words(error)}; a loading process died, of memory or of a video that breaks its decoder. The same command goes on from "
            "the last checkpoint; data.cache_bytes and loaders say how much memory loading takes"
        )
    return None

"""Training run in one or many processes: from a recipe and clips to a folder of checkpoints, logs and published weights.

Takes a `TrainingRecipe`, a `ClipSource`, a folder, and the process group of `torch.distributed` if one exists. After a kill, the same call
continues from the folder.

A run has no random state: draws follow from (seed, stage, micro-batch), and rates from the step. So its state after a step is parameters,
their averages and the optimizers' moments, and a killed and continued run equals one that was not killed: bit for bit on a CPU,
to rounding on a GPU, whose kernels may add in another order each time.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from model.training import batches
from model.training.learner import Learner
from model.training.metrics_log import MetricsLog
from model.training.run_folder import RunFolder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from model.metrics.perceptual import LPIPS
    from model.training.batches import MicroBatch, StageSchedule
    from model.training.recipe import Stage, TrainingRecipe
    from model.training.source import ClipSource

    OnStep = Callable[[int, Mapping[str, float]], None]

SHOWN = 4  # clips on a sheet, the first ones of the first stage's first group


class Ranks(NamedTuple):
    """Rank of this process and number of processes in the run."""

    rank: int
    world: int

    @classmethod
    def current(cls) -> Ranks:
        """Ranks of the current process group; (0, 1) if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, in order of rank; waits for all."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def train(
    recipe: TrainingRecipe,
    source: ClipSource,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    loaders: int = 1,
    lpips: LPIPS | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Runs a recipe to its end, continuing from the state in `folder`.

    Args:
        recipe: the recipe.
        source: clips; must be the same when a run continues.
        folder: of this run only, on a file system that all processes share.
        device: of this process.
        loaders: processes that load clips, per training process; 0: the training process loads them.
        lpips: needed if the recipe has a term for it.
        on_step: called with (step, values) of logged steps, in the process of rank 0. Its exceptions end the run.

    Returns:
        FOLDER/weights, for `--checkpoint`.

    Raises:
        ValueError: an impossible recipe, a folder with another run or one in progress, a damaged checkpoint, a number of processes
        that cannot
            share a step, clips that do not fit.
        FloatingPointError: a loss or gradient is not finite; names the step, the terms and the clips. The last checkpoint is good.
        ModuleNotFoundError: an optional package for training is not installed.
    """
    ranks = Ranks.current()
    _check_shares(recipe, ranks.world)
    files = RunFolder(folder)
    if ranks.rank == 0:
        files.prepare(recipe)
    with files.locked() if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            files.remove_partial_files()
        (done, *_) = ranks.gather(files.last_step())
        learner = Learner(recipe, source, torch.device(device), lpips, first=not done and ranks.rank == 0)
        learner.distribute(ranks.world)
        if done:
            learner.load_state_dict(files.load(done))
        metrics_log = MetricsLog(files, done) if ranks.rank == 0 else None
        run = _Run(recipe, source, files, learner, ranks, metrics_log, loaders, on_step)
        try:
            run.run(done)
        finally:
            if metrics_log is not None:
                metrics_log.close()
    ranks.gather(None)  # all processes wait until the weights are written
    return files.weights


def _check_shares(recipe: TrainingRecipe, world: int) -> None:
    for stage in recipe.stages:
        if stage.batches % world:
            raise ValueError(
                f"stage {stage.name!r} has {stage.batches} micro-batches a step, which {world} processes cannot share; set batches to a "
                f"multiple of {world}, or change the number of processes"
            )


@dataclass(frozen=True, slots=True)
class _Run:
    """Training run in this process."""

    recipe: TrainingRecipe
    source: ClipSource
    files: RunFolder
    learner: Learner
    ranks: Ranks
    metrics_log: MetricsLog | None  # rank 0 has one
    loaders: int
    on_step: OnStep | None

    def run(self, done: int) -> None:
        """Runs all steps after the first `done`."""
        if not done:
            self._write_sheet(0)
        before = 0
        tables = batches.stage_schedules(self.recipe.stages, self.recipe.seed)
        for number, (stage, table) in enumerate(zip(self.recipe.stages, tables, strict=True)):
            first = max(0, done - before)
            if first < stage.steps:
                if first == 0:
                    self.learner.start_stage(number)
                self._stage(stage, table, first, before)
            before += stage.steps

    def _stage(self, stage: Stage, table: StageSchedule, first: int, before: int) -> None:
        """Runs the stage from its step `first`; `before`: steps of earlier stages."""
        stream = batches.load(
            batches.MicroBatchDataset(self.source, table, self.recipe.seed),
            steps=range(first, stage.steps),
            per_step=stage.batches,
            rank=self.ranks.rank,
            world=self.ranks.world,
            loaders=self.loaders,
        )
        for within in range(first, stage.steps):
            step = before + within + 1
            last = step == self.recipe.steps
            values = self._step(stream, stage.batches // self.ranks.world, within, step)
            if self._logs(step) or (stage.alternates and self._logs(step + 1)):
                self._log(step, stage, values)
            if step % self.recipe.sheet_every == 0 or last:
                self._write_sheet(step)
            if step % self.recipe.checkpoint_every == 0 or last:
                self._publish_and_checkpoint(step)

    def _logs(self, step: int) -> bool:
        """Whether a step is logged. Where steps alternate, the one before it is too: each has the terms of one of the two networks."""
        return step % self.recipe.log_every == 0 or step == self.recipe.steps

    def _step(self, stream: Iterator[MicroBatch], own: int, within: int, step: int) -> list[dict[str, Any]]:
        """Runs one step with `own` micro-batches in this process. Returns the values of each."""
        keys: list[str] = []
        values: list[dict[str, Any]] = []
        for index in range(own):
            clock = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - clock
            keys += batch.keys
            terms = self.learner.accumulate(batch, within, share=1.0 / own, last=index == own - 1)
            values.append(terms | {"waited": waited, "seconds": time.perf_counter() - clock})
        lengths = self.learner.clip_gradients(within)
        if not all(map(isfinite, lengths.values())):
            self._stop(step, keys, values, lengths)
        rate = self.learner.update(within)
        return [terms | lengths | {"learning_rate": rate} for terms in values]

    def _stop(self, step: int, keys: list[str], values: list[dict[str, Any]], lengths: dict[str, float]) -> None:
        """Raises FloatingPointError in all processes, which all have the same exchanged gradients."""
        broken = sorted({name for terms in values for name, value in terms.items() if not isfinite(float(value))})
        everyone = self.ranks.gather((keys, broken))
        names = sorted({name for _, own in everyone for name in own}) or [
            name for name, length in lengths.items() if not isfinite(length)
        ]
        clips = [key for own, _ in everyone for key in own]
        slower = "lower the learning rate"
        if self.files.last_step():  # the folder's recipe is fixed
            slower = f"{slower} in a new folder that starts with start: {{weights: {self.files.weights}}}"
        raise FloatingPointError(
            f"step {step} is not finite ({', '.join(names)}); its clips: {', '.join(clips)}. Nothing was learned from them. The last "
            f"checkpoint is good, but continuing from it fails at the same step: check the clips, or {slower}"
        )

    def _log(self, step: int, stage: Stage, values: list[dict[str, Any]]) -> None:
        """Logs means over the micro-batches of all processes."""
        means = [
            {
                name: float(torch.stack([torch.as_tensor(own[name], dtype=torch.float64) for own in values]).mean())
                for name in values[0]
            }
        ]
        everyone = [own for rank in self.ranks.gather(means) for own in rank]
        mean = {name: sum(own[name] for own in everyone) / len(everyone) for name in everyone[0]}
        if self.metrics_log is not None:
            self.metrics_log.values(step, stage.name, mean)
            if self.on_step is not None:
                self.on_step(step, mean)

    def _write_sheet(self, step: int) -> None:
        """Writes a sheet of the first clips and their reconstructions by the published weights."""
        if self.metrics_log is None:
            return
        stage = self.recipe.stages[0]
        group = stage.groups[0]
        pairs, titles = [], []
        for index in range(SHOWN):
            clip = batches.source_clip(self.source, index, stage, group)
            video = clip.video_CTHW[:, :, : group.height, : group.width]
            pairs.append((video, self.learner.reconstruct(video[None])[0]))
            titles.append(clip.key)
        self.metrics_log.sheet(step, pairs, titles)

    def _publish_and_checkpoint(self, step: int) -> None:
        """Publishes weights, then writes a checkpoint: a resumed run starts after the checkpoint and would not publish these weights."""
        if self.metrics_log is None:
            return
        self.metrics_log.flush()
        network = self.learner.network
        facts = {"network": self.recipe.network, "seed": self.recipe.seed, "steps": step}
        self.files.publish(network.config, self.learner.weights(), facts)
        self.files.save(step, self.learner.state_dict(), keep=self.recipe.keep_checkpoints)

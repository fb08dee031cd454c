"""The training run: recipe and clips in, a folder of checkpoints, logs and weights out; one process or many.

Enters: a `TrainingRecipe`, a `ClipSource`, a folder, and `torch.distributed`'s process group where one was begun. Leaves: `FOLDER/weights`,
and a folder that the same call continues from after a kill.

A run keeps no random state. What is drawn follows from (seed, stage, micro-batch); rates from the step; so the state of a run after a step
is parameters, their averages, and the optimizers' moments, and a run that was killed and continued is the run that was not.
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
from model.training.journal import Journal
from model.training.learner import Learner
from model.training.run_folder import RunFolder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from model.training.batches import MicroBatch, Timetable
    from model.training.perceptual import LPIPS
    from model.training.recipe import Stage, TrainingRecipe
    from model.training.source import ClipSource

    OnStep = Callable[[int, Mapping[str, float]], None]

SHOWN = 4  # clips on a sheet: the first of the first stage's first group


class Ranks(NamedTuple):
    """This process among those of the run."""

    rank: int
    world: int

    @classmethod
    def here(cls) -> Ranks:
        """Of the process group that was begun; alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def all(self, thing: Any) -> list[Any]:
        """Everyone's, in order of rank; all wait for all."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things


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
    """Runs a recipe to its end, from where `folder` has it.

    Args:
        recipe: what to do.
        source: clips; the same ones when a run continues.
        folder: of this run alone; on a file system that all processes see.
        device: of this process.
        loaders: processes that make clips, per training process; 0: the training process does.
        lpips: where the recipe has a term for it.
        on_step: told (step, values) of logged steps, in the process of rank 0. What it raises ends the run.

    Returns:
        FOLDER/weights, which `--checkpoint` takes.

    Raises:
        ValueError: a recipe that cannot be, a folder with another run or one under way, a damaged checkpoint, processes that cannot share a
            step out, clips that do not fit.
        FloatingPointError: a loss or gradient is not finite; names the step, the terms and the clips. The last checkpoint is good.
        ModuleNotFoundError: what training needs besides is not installed.
    """
    ranks = Ranks.here()
    _check_shares(recipe, ranks.world)
    files = RunFolder(folder)
    if ranks.rank == 0:
        files.begin(recipe)
    with files.held() if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            files.clean()
        (done, *_) = ranks.all(files.last_step())
        learner = Learner(recipe, source, torch.device(device), lpips, first=not done and ranks.rank == 0)
        learner.distribute(ranks.world)
        if done:
            learner.load_state_dict(files.load(done, learner.device))
        journal = Journal(files, done) if ranks.rank == 0 else None
        run = _Run(recipe, source, files, learner, ranks, journal, loaders, on_step)
        try:
            run.go(done)
        finally:
            if journal is not None:
                journal.close()
    ranks.all(None)  # nobody leaves before the weights are there
    return files.weights


def _check_shares(recipe: TrainingRecipe, world: int) -> None:
    for stage in recipe.stages:
        if stage.batches % world:
            raise ValueError(
                f"stage {stage.name!r} has {stage.batches} micro-batches a step, which {world} processes cannot share; make batches a "
                f"multiple of {world}, or run another number of processes"
            )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run under way in this process."""

    recipe: TrainingRecipe
    source: ClipSource
    files: RunFolder
    learner: Learner
    ranks: Ranks
    journal: Journal | None  # rank 0 has one
    loaders: int
    on_step: OnStep | None

    def go(self, done: int) -> None:
        """All steps after the first `done`."""
        if not done:
            self._picture(0)
        before = 0
        tables = batches.timetables(self.recipe.stages, self.recipe.seed)
        for number, (stage, table) in enumerate(zip(self.recipe.stages, tables, strict=True)):
            first = max(0, done - before)
            if first < stage.steps:
                if first == 0:
                    self.learner.enter(number)
                self._stage(stage, table, first, before)
            before += stage.steps

    def _stage(self, stage: Stage, table: Timetable, first: int, before: int) -> None:
        """The stage's steps from its step `first` on; `before`: steps of the stages before."""
        stream = batches.load(
            batches.MicroBatches(self.source, table, self.recipe.seed),
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
            if step % self.recipe.log_every == 0 or last:
                self._tell(step, stage, values)
            if step % self.recipe.sheet_every == 0 or last:
                self._picture(step)
            if step % self.recipe.checkpoint_every == 0 or last:
                self._keep(step)

    def _step(self, stream: Iterator[MicroBatch], own: int, within: int, step: int) -> list[dict[str, Any]]:
        """One step with `own` micro-batches of this process. Leaves the values of each."""
        keys: list[str] = []
        values: list[dict[str, Any]] = []
        for place in range(own):
            clock = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - clock
            keys += batch.keys
            found = self.learner.accumulate(batch, within, share=1.0 / own, last=place == own - 1)
            values.append(found | {"waited": waited, "seconds": time.perf_counter() - clock})
        lengths = self.learner.gradient_lengths(within)
        if not all(map(isfinite, lengths.values())):
            self._stop(step, keys, values, lengths)
        rate = self.learner.move(within)
        return [found | lengths | {"learning_rate": rate} for found in values]

    def _stop(self, step: int, keys: list[str], values: list[dict[str, Any]], lengths: dict[str, float]) -> None:
        """Raises, in all processes alike: gradients were exchanged, so all have the same ones."""
        broken = sorted({name for found in values for name, value in found.items() if not isfinite(float(value))})
        everyone = self.ranks.all((keys, broken))
        terms = sorted({name for _, names in everyone for name in names}) or [
            name for name, length in lengths.items() if not isfinite(length)
        ]
        clips = [key for own, _ in everyone for key in own]
        slower = "lower the learning rate"
        if self.files.last_step():  # the folder's recipe is fixed
            slower = f"{slower} in a folder of its own that begins with start: {{weights: {self.files.weights}}}"
        raise FloatingPointError(
            f"step {step} is not finite ({', '.join(terms)}); its clips: {', '.join(clips)}. Nothing was learned from them; the last "
            f"checkpoint is good, and goes the same way again. Look at the clips, or {slower}"
        )

    def _tell(self, step: int, stage: Stage, values: list[dict[str, Any]]) -> None:
        """Means over the micro-batches of all processes."""
        means = [
            {
                name: float(torch.stack([torch.as_tensor(found[name], dtype=torch.float64) for found in values]).mean())
                for name in values[0]
            }
        ]
        everyone = [own for rank in self.ranks.all(means) for own in rank]
        mean = {name: sum(own[name] for own in everyone) / len(everyone) for name in everyone[0]}
        if self.journal is not None:
            self.journal.values(step, stage.name, mean)
            if self.on_step is not None:
                self.on_step(step, mean)

    def _picture(self, step: int) -> None:
        """The first clips and what the published weights make of them."""
        if self.journal is None:
            return
        group = self.recipe.stages[0].groups[0]
        pairs, titles = [], []
        for index in range(SHOWN):
            clip = self.source.clip(index, group.frames, group.height, group.width)
            video = clip.video_CTHW[:, :, : group.height, : group.width]
            pairs.append((video, self.learner.reconstruct(video[None])[0]))
            titles.append(clip.key)
        self.journal.sheet(step, pairs, titles)

    def _keep(self, step: int) -> None:
        """The weights of now, then a checkpoint: where there is one, nobody comes back to publish what it stands for."""
        if self.journal is None:
            return
        self.journal.flush()
        network = self.learner.network
        facts = {"network": self.recipe.network, "seed": self.recipe.seed, "steps": step}
        self.files.publish(network.config, self.learner.weights(), facts)
        self.files.save(step, self.learner.state_dict(), keep=self.recipe.keep_checkpoints)

"""Schedule of micro-batches, fixed by the recipe, and their loading in worker processes.

A step has `stage.batches` micro-batches, numbered through the stage; number n belongs to step n // batches. Its group, clips,
crops and flips follow from (seed, stage, n) alone. So the data of a step do not depend on the number of processes that share it,
on the number of loaders, or on where a run was resumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.training.recipe import Group, Stage
    from model.training.source import Clip, ClipSource

AHEAD = 3  # micro-batches that each loader process prefetches
# Purposes of seeded draws; each has its own number, so that draws do not coincide.
GROUPS, CROPS = 1, 2


class MicroBatch(NamedTuple):
    """Clips of one group."""

    number: int  # within the stage
    keys: tuple[str, ...]
    video_BCTHW: torch.Tensor  # uint8 RGB `B 3 T H W`

    def __repr__(self) -> str:
        return f"MicroBatch({self.number}, {self.keys}, {tuple(self.video_BCTHW.shape)})"


class StageSchedule:
    """Micro-batches of a stage: the group of each, and its first clip.

    Clips are numbered through all stages from `first_clip`; none is used twice.
    """

    def __init__(self, stage: Stage, number: int, seed: int, first_clip: int) -> None:
        """`number` is the stage's index in the recipe."""
        self.stage = stage
        count = stage.steps * stage.batches
        weights = np.array([group.weight for group in stage.groups])
        drawn = np.random.default_rng([seed, GROUPS, number]).random(count)
        last = len(stage.groups) - 1
        self._group = np.minimum(np.searchsorted(np.cumsum(weights / weights.sum()), drawn, side="right"), last)
        sizes = np.array([group.batch for group in stage.groups])[self._group]
        self._first = first_clip + np.cumsum(sizes) - sizes
        self.next_clip = first_clip + int(sizes.sum())

    def group(self, number: int) -> Group:
        """Group of a micro-batch."""
        return self.stage.groups[int(self._group[number])]

    def clips(self, number: int) -> range:
        """RankSampler of a micro-batch's clips in the source."""
        first = int(self._first[number])
        return range(first, first + self.group(number).batch)


def stage_schedules(stages: tuple[Stage, ...], seed: int) -> list[StageSchedule]:
    """Schedules of all stages of a recipe."""
    tables: list[StageSchedule] = []
    for number, stage in enumerate(stages):
        tables.append(StageSchedule(stage, number, seed, tables[-1].next_clip if tables else 0))
    return tables


class MicroBatchDataset(Dataset[MicroBatch]):
    """Dataset that loads micro-batch n of a stage."""

    def __init__(self, source: ClipSource, table: StageSchedule, seed: int) -> None:
        self._source, self._table, self._seed = source, table, seed

    def __getitem__(self, number: int) -> MicroBatch:
        """Loads micro-batch `number`. Raises ValueError if the source returns a clip of another size or dtype."""
        group = self._table.group(number)
        keys, videos = [], []
        for index in self._table.clips(number):
            clip = source_clip(self._source, index, self._table.stage, group)
            keys.append(clip.key)
            videos.append(_random_crop(clip.video_CTHW, group, np.random.default_rng([self._seed, CROPS, index])))
        return MicroBatch(number, tuple(keys), torch.stack(videos))


def source_clip(source: ClipSource, index: int, stage: Stage, group: Group) -> Clip:
    """Clip number `index` as a stage takes it from its source: `group.frames` frames, `stage.frame_interval` apart, not cropped.

    Raises:
        ValueError: the source returns a clip of another size or dtype.
    """
    clip = source.clip(index, stage.source_frames(group), group.height, group.width)
    _check(clip, group, stage.source_frames(group))
    return clip._replace(video_CTHW=clip.video_CTHW[:, :: stage.frame_interval])


class RankSampler(Sampler[int]):
    """RankSampler of one rank's micro-batches in a range of steps: every `world`-th of each step."""

    def __init__(self, steps: range, per_step: int, rank: int, world: int) -> None:
        self._steps, self._own = steps, range(rank, per_step, world)
        self._per_step = per_step

    def __iter__(self) -> Iterator[int]:
        for step in self._steps:
            for own in self._own:
                yield step * self._per_step + own

    def __len__(self) -> int:
        return len(self._steps) * len(self._own)


def load(
    batches: MicroBatchDataset, *, steps: range, per_step: int, rank: int, world: int, loaders: int
) -> Iterator[MicroBatch]:
    """Loads this rank's micro-batches of the steps, in order, in `loaders` processes (0: in this process).

    `per_step` is a multiple of `world`, so all ranks have equally many per step.
    """
    numbers = RankSampler(steps, per_step, rank, world)
    # Loaders are spawned, not forked: a fork copies locks that threads of BLAS, Ray or CUDA hold.
    processes = {"multiprocessing_context": "spawn", "prefetch_factor": AHEAD} if loaders else {}
    loader = DataLoader(batches, sampler=numbers, batch_size=None, num_workers=loaders, **processes)  # type: ignore[arg-type]
    return iter(loader)


def _check(clip: Clip, group: Group, wanted: int) -> None:
    video = clip.video_CTHW
    colours, frames, height, width = video.shape if video.ndim == 4 else (0, 0, 0, 0)
    fits = colours == 3 and frames == wanted and height >= group.height and width >= group.width
    if not fits or video.dtype != torch.uint8:
        raise ValueError(
            f"the source returned clip {clip.key} as {video.dtype} {tuple(video.shape)}, expected uint8 (3, {wanted}, H, W) with "
            f"sides of at least {group.height}x{group.width}"
        )


def _random_crop(video_CTHW: torch.Tensor, group: Group, draw: np.random.Generator) -> torch.Tensor:
    """Random crop of the group's size, flipped half of the time."""
    top = int(draw.integers(video_CTHW.shape[2] - group.height + 1))
    left = int(draw.integers(video_CTHW.shape[3] - group.width + 1))
    piece = video_CTHW[:, :, top : top + group.height, left : left + group.width]
    return piece.flip(3) if draw.random() < 0.5 else piece

"""Order of global batches over datasets and epochs: a pure function of row counts, batch rule, mixture and seed.

Ranks, threads and machines do not enter: every rank computes the same order and takes its share of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ConfigError
from pipeline.loader.arguments import integer, number
from pipeline.loader.epoch import RowsOfBucket, file_window
from pipeline.loader.mixture import Mixture, Weights, checked
from pipeline.loader.part import Part, PartOptions
from pipeline.loader.rules import Pack, Tokens, check_world, unknown_buckets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from pipeline.loader.epoch import BucketRows
    from pipeline.loader.packing import Sequence
    from pipeline.loader.rules import BatchRule


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """Rows of a dataset by bucket. `identity` tells it from every other: snapshot, filter."""

    identity: str
    buckets: Mapping[str, BucketRows]


class GlobalBatch(NamedTuple):
    """What all ranks read in one step."""

    step: int
    dataset: int
    epoch: int
    content: RowsOfBucket | list[Sequence]

    def share(self, rank: int, world: int) -> RowsOfBucket | list[Sequence]:
        """The part of rank `rank` of `world`: contiguous, all parts equally large."""
        if isinstance(self.content, RowsOfBucket):
            each = len(self.content.rows) // world
            return RowsOfBucket(self.content.bucket, self.content.rows[rank * each : (rank + 1) * each])
        each = len(self.content) // world
        return self.content[rank * each : (rank + 1) * each]


class Order:
    """`batch(step)` for any step, `total` steps. Not safe for threads."""

    def __init__(
        self,
        datasets: SequenceOf[DatasetRows],
        rule: BatchRule,
        *,
        seed: int = 0,
        shuffle: str = "window:64",
        epochs: int | SequenceOf[int | None] | None = None,
        drop_last: bool = True,
        small_buckets: str = "error",
        weights: SequenceOf[Weights] | None = None,
        image_ratio: float | None = None,
    ) -> None:
        """`epochs`: of each dataset, None without end. `weights`: of the datasets, by default as many steps as each has batches.
        `small_buckets`: `drop` leaves out buckets that are too small for one batch. `image_ratio`: fraction of steps whose batch has
        one-frame buckets; by default they are shuffled among the others.

        Raises:
            ConfigError: no dataset, one given twice, a rule that gives a dataset or a bucket no batch, unknown buckets, weights or epochs
                that do not fit.
        """
        if not datasets:
            raise ConfigError("datasets: expected at least one")
        _check_different(datasets)
        known = sorted({name for dataset in datasets for name in dataset.buckets})
        if unknown := unknown_buckets(rule, known):
            raise ConfigError(f"batch: no dataset has bucket {', '.join(unknown)}; there are {', '.join(known)}")
        if small_buckets not in ("error", "drop"):
            raise ConfigError(f"small_buckets: expected error or drop, got {small_buckets!r}")
        if image_ratio is not None and not 0.0 < (image_ratio := number("image_ratio", image_ratio, 0.0, 1.0)) < 1.0:
            raise ConfigError(f"image_ratio: expected a number between 0 and 1, got {image_ratio}")
        limits = epoch_limits(epochs, len(datasets))
        self._rule, self._image_ratio, self._small_buckets = rule, image_ratio, small_buckets
        options = PartOptions(rule, integer("seed", seed), file_window(shuffle), drop_last, small_buckets)
        self._parts = [
            Part(place, dataset.identity, dataset.buckets, options, epochs=limit, images=images)
            for place, (dataset, limit) in enumerate(zip(datasets, limits, strict=True))
            for images in ((None,) if image_ratio is None else (False, True))
        ]
        explicit = weights is not None
        weights = (
            self._default_weights(len(datasets))
            if weights is None
            else [checked(item, len(datasets)) for item in weights]
        )
        self._check_not_empty(datasets, weights, explicit=explicit)
        lengths = [part.length() for part in self._parts]
        self._mixture = Mixture(lengths, weights if image_ratio is None else self._by_kind(weights, image_ratio))

    def total(self) -> int | None:
        """Steps in all; None without end."""
        return self._mixture.total()

    def batch(self, step: int) -> GlobalBatch | None:
        """The global batch of a step; None after the end."""
        if (place := self._mixture.locate(step)) is None:
            return None
        part = self._parts[place[0]]
        epoch, content = part.batch(place[1])
        return GlobalBatch(step, part.dataset, epoch, content)

    def check_world(self, world: int) -> None:
        """Raises ConfigError where `world` ranks cannot share every batch equally."""
        if isinstance(self._rule, Pack):
            check_world(self._rule.sequences, world, f"Pack.sequences is {self._rule.sequences}")
            return
        for part in self._parts:
            for bucket, size in part.sizes().items():
                multiple = lcm(self._rule.multiple, world) if isinstance(self._rule, Tokens) else None
                check_world(size, world, f"bucket {bucket} has {size} latents", multiple)

    def _default_weights(self, datasets: int) -> list[Weights]:
        each = [sum(part.weight() for part in self._parts if part.dataset == place) for place in range(datasets)]
        return [Weights(0, tuple(each) if any(each) else (1.0,) * datasets)]

    def _check_not_empty(self, datasets: SequenceOf[DatasetRows], weights: list[Weights], *, explicit: bool) -> None:
        """Raises ConfigError for a dataset with a weight, or a bucket of one, that has no batch; for no images or no videos at all where
        both are asked for.
        """
        parts = self._parts
        for place, dataset in enumerate(datasets):
            of_dataset = [part for part in parts if part.dataset == place]
            used = not explicit or any(item.values[place] > 0 for item in weights)
            if used and all(part.empty for part in of_dataset):
                raise ConfigError(_not_one(dataset.identity, "", of_dataset, self._rule, self._small_buckets))
        for images, kind in ((False, " of videos"), (True, " of images")):
            of_kind = [part for part in parts if part.images is images]
            if of_kind and all(part.empty for part in of_kind):
                names = ", ".join(dataset.identity for dataset in datasets)
                raise ConfigError(_not_one(names, kind, of_kind, self._rule, self._small_buckets))
        for part in parts:
            if not explicit or any(item.values[part.dataset] > 0 for item in weights):
                part.check_small_buckets()

    def _by_kind(self, weights: list[Weights], ratio: float) -> list[Weights]:
        """Weights of videos and images of each dataset. Datasets that have images share their fraction, and so do those with videos."""
        found = []
        for item in weights:
            values = []
            for part in self._parts:
                having = sum(item.values[p.dataset] for p in self._parts if p.images is part.images and not p.empty)
                if not having:
                    raise ConfigError(
                        f"image_ratio: from step {item.from_step} on no dataset with {'images' if part.images else 'videos'} has a weight"
                    )
                fraction = ratio if part.images else 1 - ratio
                values.append(0.0 if part.empty else item.values[part.dataset] * fraction * (sum(item.values) / having))
            found.append(Weights(item.from_step, tuple(values)))
        return found


def epoch_limits(epochs: Any, datasets: int) -> list[int | None]:
    """Epochs of each dataset. Raises ConfigError for anything but numbers >= 1 or None."""
    limits = list(epochs) if isinstance(epochs, list | tuple) else [epochs] * datasets
    try:
        found = [None if limit is None else integer("epochs", limit, 1) for limit in limits]
    except ConfigError:
        found = []
    if len(found) != datasets:
        raise ConfigError(f"epochs: expected a number >= 1 or None for each of {datasets} datasets, got {epochs!r}")
    return found


def _check_different(datasets: SequenceOf[DatasetRows]) -> None:
    names = [dataset.identity for dataset in datasets]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ConfigError(
            f"datasets: {twice[0]} is given twice, which would give its batches twice in a row; give it once, with a larger weight"
        )


def _not_one(identity: str, kind: str, parts: list[Part], rule: BatchRule, small_buckets: str) -> str:
    shown = "; ".join(part.shown() for part in parts if kind or part.images is not True or part.shown() != "nothing")
    rows = [count for part in parts for count in part.rows_used()]
    if shown == "nothing":
        advice = (
            "leave image_ratio out, or add a dataset that has some"
            if kind
            else "leave it out, or open a snapshot that has rows"
        )
    elif isinstance(rule, Pack):
        advice = f"lower Pack.sequences ({rule.sequences}), or give drop_last=False"
    elif not rows:
        named = any(part.sizes() for part in parts)
        advice = "keep more of one of them" if named else "give the size of a batch for one of them"
    else:
        size = "Tokens.budget, for a batch of" if isinstance(rule, Tokens) else "the batch size to"
        advice = f"lower {size} at most {max(rows) if small_buckets == 'drop' else min(rows)}, or give drop_last=False"
    return f"batch: dataset {identity} gives not one global batch{kind}; it has {shown}; {advice}"

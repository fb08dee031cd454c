"""Order of global batches over datasets and epochs: a pure function of row counts, batch rule, mixture and seed.

Ranks, threads and machines do not enter: every rank computes the same order and takes its share of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import ConfigError
from pipeline.loader.draws import key_of
from pipeline.loader.epoch import Epoch, PackedEpoch, RowsOfBucket, Sequence, batches_of, file_window, shares_of
from pipeline.loader.mixture import Mixture, Weights
from pipeline.loader.rules import Pack, check_world, unknown_buckets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from pipeline.loader.epoch import BucketRows
    from pipeline.loader.rules import BatchRule

EPOCHS_HELD = 2  # of each part of the mixture: the present one, and the next while its first batches are fetched ahead


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
    """`batch(step)` for any step, `total` steps."""

    def __init__(
        self,
        datasets: SequenceOf[DatasetRows],
        rule: BatchRule,
        *,
        seed: int = 0,
        shuffle: str = "window:64",
        epochs: int | SequenceOf[int | None] | None = None,
        drop_last: bool = True,
        weights: SequenceOf[Weights] | None = None,
        image_ratio: float | None = None,
    ) -> None:
        """`epochs`: of each dataset, None without end. `weights`: of the datasets, by default as many steps as each has batches.
        `image_ratio`: fraction of steps whose batch has one-frame buckets; by default they are shuffled among the others.

        Raises:
            ConfigError: no dataset, a rule that gives a dataset no batch, unknown buckets, weights or epochs that do not fit.
        """
        if not datasets:
            raise ConfigError("datasets: expected at least one")
        known = sorted({name for dataset in datasets for name in dataset.buckets})
        if unknown := unknown_buckets(rule, known):
            raise ConfigError(f"batch: no dataset has bucket {', '.join(unknown)}; there are {', '.join(known)}")
        limits = [epochs] * len(datasets) if epochs is None or isinstance(epochs, int) else list(epochs)
        if len(limits) != len(datasets) or any(limit is not None and limit < 1 for limit in limits):
            raise ConfigError(
                f"epochs: expected a number >= 1 or None for each of {len(datasets)} datasets, got {epochs}"
            )
        window = file_window(shuffle)
        self._rule = rule
        self._parts = [
            _Part(number, dataset, rule, seed, window, limit, drop_last=drop_last, images=images)
            for number, (dataset, limit) in enumerate(zip(datasets, limits, strict=True))
            for images in ((None,) if image_ratio is None else (False, True))
        ]
        self._mixture = Mixture(
            [part.length() for part in self._parts], self._weights(len(datasets), weights, image_ratio)
        )

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
            check_world(self._rule.sequences, world, "Pack.sequences")
            return
        for part in self._parts:
            for bucket, size in part.sizes().items():
                check_world(size, world, f"bucket {bucket}")

    def _weights(self, datasets: int, weights: SequenceOf[Weights] | None, image_ratio: float | None) -> list[Weights]:
        if image_ratio is not None and not 0.0 < image_ratio < 1.0:
            raise ConfigError(f"image_ratio: expected a number between 0 and 1, got {image_ratio}")
        if weights is None:
            weights = [
                Weights(
                    0,
                    tuple(
                        float(sum(part.per_epoch() for part in self._parts if part.dataset == number))
                        for number in range(datasets)
                    ),
                )
            ]
        if image_ratio is None:
            return list(weights)
        return [
            Weights(
                item.from_step,
                tuple(v for value in item.values for v in (value * (1 - image_ratio), value * image_ratio)),
            )
            for item in weights
        ]


class _Part:
    """Batches of one dataset, or of its images or videos alone, epoch after epoch."""

    def __init__(
        self,
        dataset: int,
        rows: DatasetRows,
        rule: BatchRule,
        seed: int,
        window: int | None,
        epochs: int | None,
        *,
        drop_last: bool,
        images: bool | None,
    ) -> None:
        self.dataset = dataset
        self._buckets = {
            name: found
            for name, found in rows.buckets.items()
            if found.total and (images is None or images == (_frames(name) == 1))
        }
        self._rule, self._window, self._epochs, self._drop_last = rule, window, epochs, drop_last
        self._key = key_of(seed, rows.identity, -1 if images is None else int(images))
        self._shares = shares_of(self._buckets, rule)
        self._held: dict[int, Epoch | PackedEpoch] = {}
        self._ends: list[int] = []  # batches up to the end of each epoch, where that depends on the epoch
        if not self.per_epoch():
            kind = {None: "", False: " of videos", True: " of images"}[images]
            shown = ", ".join(f"{name} {found.total}" for name, found in sorted(self._buckets.items())) or "nothing"
            raise ConfigError(
                f"batch: dataset {rows.identity} gives not one global batch{kind}; it has {shown} (bucket and rows); "
                "lower the batch size, or give drop_last=False"
            )

    def sizes(self) -> dict[str, int]:
        return {name: share.size for name, share in self._shares.items()}

    def per_epoch(self) -> int:
        """Batches of an epoch; of the first one where they differ."""
        if isinstance(self._rule, Pack):
            return len(self._epoch(0))
        return sum(
            batches_of(round(share.keep * self._buckets[name].total), share.size, self._drop_last)
            for name, share in self._shares.items()
        )

    def length(self) -> int | None:
        if self._epochs is None:
            return None
        if isinstance(self._rule, Pack):
            return sum(len(self._epoch(number)) for number in range(self._epochs))
        return self._epochs * self.per_epoch()

    def batch(self, n: int) -> tuple[int, RowsOfBucket | list[Sequence]]:
        """Epoch and content of the `n`-th batch of this part."""
        if not isinstance(self._rule, Pack):
            number, inside = divmod(n, self.per_epoch())
            return number, self._epoch(number).batch(inside)
        while not self._ends or self._ends[-1] <= n:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(len(self._ends))))
        number = next(i for i, end in enumerate(self._ends) if n < end)
        return number, self._epoch(number).batch(n - (self._ends[number - 1] if number else 0))

    def _epoch(self, number: int) -> Epoch | PackedEpoch:
        if number not in self._held:
            key = key_of(self._key, number)
            if isinstance(self._rule, Pack):
                made: Epoch | PackedEpoch = PackedEpoch(
                    self._buckets, self._rule, key, self._window, drop_last=self._drop_last
                )
            else:
                made = Epoch(self._buckets, self._shares, key, self._window, drop_last=self._drop_last)
            while len(self._held) >= EPOCHS_HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = made
        return self._held[number]


def _frames(bucket: str) -> int:
    """Pixel frames of a bucket by its name, `17x256x256`."""
    return int(bucket.removeprefix("v").split("x")[0])

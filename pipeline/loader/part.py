"""Batches of one dataset, or of its images or videos alone, epoch after epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from pipeline.errors import ConfigError
from pipeline.loader.draws import key_of
from pipeline.loader.epoch import Epoch, RowsOfBucket, batches_of, shares_of
from pipeline.loader.packing import PackedEpoch, Sequence
from pipeline.loader.rules import Pack, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipeline.loader.epoch import BucketRows
    from pipeline.loader.rules import BatchRule

EPOCHS_HELD = 2  # of each part: the present one, and the next while its first batches are fetched ahead
NAMED = 20  # buckets in a message
Made = TypeVar("Made", Epoch, PackedEpoch)


@dataclass(frozen=True, slots=True)
class PartOptions:
    """What all parts of an order have in common. `window`: files that are shuffled together, None for no shuffling."""

    rule: BatchRule
    seed: int
    window: int | None
    drop_last: bool
    small_buckets: str


class Part:
    """Batches of dataset number `dataset`. `images`: of its images alone, of its videos alone, or None for both."""

    def __init__(
        self,
        dataset: int,
        identity: str,
        buckets: Mapping[str, BucketRows],
        options: PartOptions,
        *,
        epochs: int | None,
        images: bool | None,
    ) -> None:
        """Raises ConfigError for a latent that the rule has no space for."""
        self.dataset, self.images = dataset, images
        self._identity, self._options, self._epochs = identity, options, epochs
        self._buckets = {
            name: found
            for name, found in buckets.items()
            if found.total and (images is None or images == (frames_of(name) == 1))
        }
        self._key = key_of(options.seed, identity, -1 if images is None else int(images))
        self._shares = shares_of(self._buckets, options.rule)
        self._held: dict[int, Epoch] = {}
        self._held_packed: dict[int, PackedEpoch] = {}
        self._ends: list[int] = []  # batches up to the end of each epoch, where that depends on the epoch
        self._lengths = {
            name: batches_of(round(share.keep * self._buckets[name].total), share.size, options.drop_last)
            for name, share in self._shares.items()
        }
        self._per_epoch = sum(self._lengths.values())
        if isinstance(options.rule, Pack):
            self.empty = not self._buckets or not self._packed(0).has(1)
        else:
            self.empty = not self._per_epoch

    def shown(self) -> str:
        """Buckets with their rows and batches, as text."""
        return self._named(sorted(self._buckets)) or "nothing"

    def rows_used(self) -> list[int]:
        """Rows that an epoch takes of each bucket of the rule; buckets without rows are left out."""
        rows = [round(share.keep * self._buckets[name].total) for name, share in self._shares.items()]
        return [count for count in rows if count]

    def sizes(self) -> dict[str, int]:
        """Latents of a global batch of each bucket."""
        return {name: share.size for name, share in self._shares.items()}

    def weight(self) -> float:
        """Batches of an epoch; with `Pack` those that would hold all tokens without a gap."""
        rule = self._options.rule
        if not isinstance(rule, Pack):
            return float(self._per_epoch)
        tokens = sum(tokens_of(found.grid, rule.patch) * found.total for found in self._buckets.values())
        return tokens / (rule.seq_len * rule.sequences)

    def length(self) -> int | Callable[[int], int | None] | None:
        """Batches of all epochs, None without end. With `Pack` a function: the length if it is at most its argument, else None."""
        if self.empty:
            return 0
        if self._epochs is None:
            return None
        return self._length_within if isinstance(self._options.rule, Pack) else self._epochs * self._per_epoch

    def batch(self, n: int) -> tuple[int, RowsOfBucket | list[Sequence]]:
        """Epoch and content of the `n`-th batch of this part."""
        if not isinstance(self._options.rule, Pack):
            number, inside = divmod(n, self._per_epoch)
            return number, self._plain(number).batch(inside)
        number = next((i for i, end in enumerate(self._ends) if n < end), len(self._ends))
        while True:
            before = self._ends[number - 1] if number else 0
            epoch = self._packed(number)
            if epoch.has(n - before + 1):
                return number, epoch.batch(n - before)
            if number == len(self._ends):
                self._ends.append(before + len(epoch))
            number += 1

    def _length_within(self, most: int) -> int | None:
        """Packs no more than it must."""
        while len(self._ends) < (self._epochs or 0):
            epoch, before = self._packed(len(self._ends)), self._ends[-1] if self._ends else 0
            if epoch.has(most - before + 1):
                return None
            self._ends.append(before + len(epoch))
        return self._ends[-1] if self._ends[-1] <= most else None

    def check_small_buckets(self) -> None:
        """Raises ConfigError for buckets that the rule uses and that give no batch, unless `small_buckets` is `drop`."""
        small = sorted(name for name, length in self._lengths.items() if not length)
        if not small or self._options.small_buckets == "drop":
            return
        drop = ", or drop_last=False" if self._options.drop_last else ""
        raise ConfigError(
            f"batch: buckets of dataset {self._identity} are too small for one batch, their rows would never be read: "
            f'{self._named(small)}; give each a batch that fits, {{"{small[0]}": …}}, or small_buckets="drop" to leave them out{drop}'
        )

    def _named(self, buckets: list[str]) -> str:
        more = f" and {len(buckets) - NAMED} more" if len(buckets) > NAMED else ""
        return ", ".join(f"{name} ({self._described(name)})" for name in buckets[:NAMED]) + more

    def _described(self, bucket: str) -> str:
        total, share = self._buckets[bucket].total, self._shares.get(bucket)
        if share is None:
            return f"{total} rows" if isinstance(self._options.rule, Pack) else f"{total} rows, not named in batch"
        rows = f"{total} rows" if share.keep == 1.0 else f"{round(share.keep * total)} of {total} rows kept"
        return f"{rows}, batch of {share.size}"

    def _plain(self, number: int) -> Epoch:
        options = self._options
        return self._remembered(
            self._held,
            number,
            lambda key: Epoch(self._buckets, self._shares, key, options.window, drop_last=options.drop_last),
        )

    def _packed(self, number: int) -> PackedEpoch:
        options = self._options
        return self._remembered(
            self._held_packed,
            number,
            lambda key: PackedEpoch(
                self._buckets, cast(Pack, options.rule), key, options.window, drop_last=options.drop_last
            ),
        )

    def _remembered(self, held: dict[int, Made], number: int, make: Callable[[int], Made]) -> Made:
        if number not in held:
            while len(held) >= EPOCHS_HELD:  # before, so that three are never in memory
                del held[next(iter(held))]
            held[number] = make(key_of(self._key, number))
        return held[number]


def frames_of(bucket: str) -> int:
    """Pixel frames of a bucket by its name, `17x256x256`."""
    return int(bucket.removeprefix("v").split("x")[0])

"""A `ClipSource` over the user's own videos: clip number n of a corpus, the same one whenever and wherever it is asked for.

Enters: a `CorpusIndex`, what may be drawn, a seed. Leaves: clips. Each epoch is a permutation of all videos; clip n is of the video that
comes n-th, at a moment, scale and place drawn from (seed, n). A video that gives no clip of the size asked for is said once
(`unusable.py`) and the next of the permutation takes its turn, so that which one it is still follows from n.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from model.training.source import Clip
from pipeline.errors import BadDataError, InputError
from pipeline.records import Bucket
from pipeline.training.fetching import Fetcher
from pipeline.training.random_clip import random_clip
from pipeline.video.decode.refusals import only_named_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import DecodeConfig, StorageConfig
    from pipeline.training.corpus_index import CorpusIndex
    from pipeline.training.job import DataConfig
    from pipeline.training.unusable import Unusable

ORDER, DRAWS = 0, 1  # what a generator is for, beside seed and number
TRIES = 1000  # videos in a row that may be of no use before a clip is given up
# Reasons that may lie in the part of the video that was wanted; all others hold for every clip of that size.
PASSING = ("corrupt_stream", "ended_early", "size_changed", "truncated_shard")
NAMED = 3  # videos an error names


class CorpusSource:
    """Clips of a corpus. Pickles: what it holds open and has learned stays behind."""

    def __init__(
        self,
        index: CorpusIndex,
        config: DataConfig,
        limits: DecodeConfig,
        storage: StorageConfig,
        unusable: Unusable,
    ) -> None:
        """Opens nothing yet."""
        self._index, self._config, self._limits = index, config, limits
        self._unusable = unusable
        self._fetcher = Fetcher(storage, config.cache_bytes)
        self._begin()

    def _begin(self) -> None:
        self._orders: dict[int, np.ndarray] = {}
        self._useless: dict[tuple[int, Bucket], str] = {}  # (video, size) -> reason

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_orders": {}, "_useless": {}}

    def __len__(self) -> int:
        """Videos, usable or not."""
        return len(self._index)

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """As `ClipSource.clip`, of exactly this size; the key is the video's URI, with the sample's key inside of a shard.

        Raises:
            InputError: none of `TRIES` videos in a row gives a clip of this size; names reasons and some of them.
            SourceChanged, StorageUnavailable, AccessError: as the store.
        """
        size = Bucket(frames, height, width)
        epoch, first = divmod(index, len(self._index))
        order = self._order(epoch)
        failures: list[tuple[str, str]] = []
        for place in range(min(TRIES, len(order))):
            number = int(order[(first + place) % len(order)])
            reason = self._useless.get((number, size))
            if reason is None:
                try:
                    return self._draw(number, size, np.random.default_rng([self._config.seed, DRAWS, index, place]))
                except BadDataError as error:
                    reason = error.reason
                    self._give_up(number, size, error)
            failures.append((reason, self._index[number].name))
        raise InputError(_no_clip(failures, len(order), size))

    def check(self, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Draws a clip of each size (frames, height, width), before anything is built on there being some. Raises as `clip`."""
        for frames, height, width in sizes:
            self.clip(0, frames, height, width)

    def _draw(self, number: int, size: Bucket, draw: np.random.Generator) -> Clip:
        place = self._index[number]
        with self._fetcher.video(place) as video, only_named_errors("cutting a clip"):
            return Clip(place.name, random_clip(video, self._limits, self._config.clips, size, draw))

    def _give_up(self, number: int, size: Bucket, error: BadDataError) -> None:
        place = self._index[number]
        self._unusable.add(place.source.uri, place.key, error.reason, error.message)
        if error.reason not in PASSING:
            self._useless[number, size] = error.reason

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; those of the last two are at hand, for loaders that straddle a border."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            draw = np.random.default_rng([self._config.seed, ORDER, epoch])
            self._orders[epoch] = draw.permutation(len(self._index))
        return self._orders[epoch]


def _no_clip(failures: list[tuple[str, str]], videos: int, size: Bucket) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(name for name, _ in failures).most_common())
    tried = f"{videos} videos" if len(failures) == videos else f"{len(failures)} videos tried in a row, of {videos},"
    return (
        f"data.inputs: none of {tried} gives a clip of {size.frames} frames of {size.height}x{size.width}: {reasons}; such as "
        f"{', '.join(name for _, name in failures[:NAMED])}. Give other videos, smaller clips in the recipe, or look at data.clips"
    )

"""Clip source over the user's videos: clip number n of a corpus, the same whenever and wherever it is requested.

Each epoch is a permutation of all videos; clip n comes from the n-th video, at a moment, scale and position drawn from (seed, n).
If a video has no clip of the requested size, it is reported once (`unusable.py`) and the next of the permutation is used, so the
choice still follows from n.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from model.training.source import Clip
from pipeline.errors import BadDataError, InputError
from pipeline.records import Bucket
from pipeline.training.decoder_process import DecoderProcess, may_fork
from pipeline.training.fetching import Fetcher
from pipeline.training.random_clip import random_clip
from pipeline.video.decode.refusals import only_named_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import DecodeConfig, StorageConfig
    from pipeline.training.corpus_index import CorpusIndex
    from pipeline.training.job import DataConfig
    from pipeline.training.unusable import Unusable

ORDER, DRAWS = 0, 1  # purposes of seeded draws
TRIES = 1000  # unusable videos in a row before a clip is given up
# Reasons that may concern only the requested part of the video; all others hold for every clip of that size.
PASSING = ("corrupt_stream", "ended_early", "size_changed", "truncated_shard")
NAMED = 3  # videos listed in an error


class CorpusSource:
    """Clips of a corpus. Pickles without open files and without what it has learned."""

    def __init__(
        self, index: CorpusIndex, config: DataConfig, limits: DecodeConfig, storage: StorageConfig, unusable: Unusable
    ) -> None:
        """Opens nothing."""
        self._index, self._config, self._limits = index, config, limits
        self._unusable = unusable
        self._fetcher = Fetcher(storage, config.cache_bytes)
        self._decoder = DecoderProcess()
        self._reset()

    def _reset(self) -> None:
        self._orders: dict[int, np.ndarray] = {}
        self._unusable_sizes: dict[tuple[int, Bucket], str] = {}  # (video, size) -> reason

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_orders": {}, "_unusable_sizes": {}}

    def __len__(self) -> int:
        """Number of videos, usable or not."""
        return len(self._index)

    def clip(self, index: int, frames: int, height: int, width: int) -> Clip:
        """As `ClipSource.clip`, of exactly this size; the key is the video's URI, with the sample's key if it is inside a shard.

        Raises:
            InputError: none of `TRIES` videos in a row has a clip of this size; lists reasons and examples.
            SourceChanged, StorageUnavailable, AccessError: errors of the store.
        """
        if may_fork():
            self._decoder.start()  # before the fetcher has connections and threads
        size = Bucket(frames, height, width)
        epoch, first = divmod(index, len(self._index))
        order = self._order(epoch)
        failures: list[tuple[str, str]] = []
        for attempt in range(min(TRIES, len(order))):
            number = int(order[(first + attempt) % len(order)])
            reason = self._unusable_sizes.get((number, size))
            if reason is None:
                try:
                    return self._draw(number, size, np.random.default_rng([self._config.seed, DRAWS, index, attempt]))
                except BadDataError as error:
                    reason = error.reason
                    self._give_up(number, size, error)
            failures.append((reason, self._index[number].name))
        raise InputError(_no_clip(failures, len(order), size))

    def check(self, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Draws one clip of each size (frames, height, width), to find out early if there are none. Raises as `clip`."""
        for frames, height, width in sizes:
            self.clip(0, frames, height, width)

    def _draw(self, number: int, size: Bucket, draw: np.random.Generator) -> Clip:
        place = self._index[number]
        with self._fetcher.video(place) as video:
            if may_fork():
                return Clip(place.name, self._decoder.clip(video, self._limits, self._config.clips, size, draw))
            with only_named_errors("cutting a clip"):
                return Clip(place.name, random_clip(video, self._limits, self._config.clips, size, draw))

    def _give_up(self, number: int, size: Bucket, error: BadDataError) -> None:
        place = self._index[number]
        self._unusable.add(place.source.uri, place.key, error.reason, error.message)
        if error.reason not in PASSING:
            self._unusable_sizes[number, size] = error.reason

    def _order(self, epoch: int) -> np.ndarray:
        """Permutation of an epoch. Keeps the last two, for loaders that work across the border."""
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
        f"data.inputs: none of {tried} has a clip of {size.frames} frames of {size.height}x{size.width}: {reasons}; for example "
        f"{', '.join(name for _, name in failures[:NAMED])}. Use other videos, or smaller clips in the recipe, or change data.clips"
    )

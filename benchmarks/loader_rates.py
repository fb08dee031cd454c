"""Rates of reading latents: the loader, and plain `preadv` of the same tensors."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

# Batches of memory that plain reads take in turn: as many as the loader (4 ahead, one in use, one between).
RAW_BLOCKS = 6
READY = 5  # batches that the loader may have when a measurement begins: it reads 4 ahead, and makes another when one is taken


class RawReads:
    """`preadv` of the same tensors in random order into memory that is used again; nothing else. Each thread reads batches of its own."""

    def __init__(self, uri: str, batch: int) -> None:
        from pipeline.loader import LatentDataset

        self._dataset, self._batch = LatentDataset.open(uri), batch
        self._items = []
        for number in range(len(self._dataset.files)):
            index = self._dataset.indexes.get(number)
            path = self._dataset.store.uri(self._dataset.files.value("key", number))
            descriptor = os.open(path, os.O_RDONLY)
            self._items += [(descriptor, index.offset(row), index.length(row)) for row in range(len(index))]
        random.Random(0).shuffle(self._items)
        self._memory = np.ones((RAW_BLOCKS, batch, self._items[0][2]), np.uint8)

    def rate(self, seconds: float, threads: int) -> float:
        """Bytes a second; one epoch for 0 seconds."""
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(lambda thread: self._read(thread, threads, began + seconds), range(threads)))
        return total / (time.perf_counter() - began)

    def _read(self, thread: int, threads: int, end: float) -> int:
        total, mine, memory = 0, self._items[thread::threads], self._memory[thread::threads]
        while True:
            for number, at in enumerate(range(0, len(mine) - self._batch + 1, self._batch)):
                for place, (descriptor, offset, length) in zip(
                    memory[number % len(memory)], mine[at : at + self._batch], strict=True
                ):
                    if os.preadv(descriptor, [place.data], offset) != length:
                        raise RuntimeError("short read")
                    total += length
            if time.perf_counter() > end:
                return total


class OurReads:
    """The loader. Its first epoch warms it up, unless the page cache is cold."""

    def __init__(self, uri: str, batch: int, *, cold: bool, storage: Any = None, **options: Any) -> None:
        from benchmarks.loader_peers import drop_pages
        from pipeline.loader import LatentDataset, LatentLoader

        self.dataset = LatentDataset.open(uri, storage=storage)
        self._cold = cold
        self._steps = max(1, len(self.dataset) // batch)
        for number in range(len(self.dataset.files)):
            self.dataset.indexes.get(number)
        if cold:
            drop_pages(uri)
        self._loader = LatentLoader(self.dataset, batch=batch, **options)
        self._batches = iter(self._loader)
        if not cold:
            self.epoch()

    def close(self) -> None:
        """Ends reading ahead, which would disturb what is measured next."""
        self._loader.close()

    def epoch(self) -> int:
        """Bytes of one epoch."""
        return sum(item.latents.numel() * item.latents.element_size() for item in islice(self._batches, self._steps))

    def rate(self, seconds: float) -> float:
        """Bytes a second, in whole epochs. Batches that were read ahead do not count; with a cold page cache there are none."""
        if not self._cold:
            for _ in islice(self._batches, READY):
                pass
        total, began = 0, time.perf_counter()
        while not total or time.perf_counter() - began < seconds:
            total += self.epoch()
        return total / (time.perf_counter() - began)

    def waited(self, seconds: float, busy_s: float) -> float:
        """Seconds waited for a batch while the step that takes it runs Python for `busy_s`: the median."""
        waits, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            next(self._batches)
            waits.append(time.perf_counter() - began)
            while time.perf_counter() - began < waits[-1] + busy_s:
                pass
        return float(np.median(waits))

"""Reads the tensors of a batch in parallel into memory that is used again: from the cache if there is one, else by ranges of the files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.loader.fetch import Span, Wanted, spans_of
from pipeline.loader.file_index import FileIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor
    from threading import Event

    import torch

    from pipeline.errors import InputError
    from pipeline.loader.cache import TensorCache
    from pipeline.loader.decoding import Decoder
    from pipeline.loader.fetch import Fetcher
    from pipeline.loader.memory import BatchMemory
    from pipeline.loader.slots import Slot, SlotFinder
    from pipeline.loader.stats import LoaderStats

# Least bytes of local reads that are worth a thread of their own. From memory few are, since threads wait for the interpreter more than
# they gain: 32 tensors of 0.1 MB by one thread 2,700 MB/s, by three 1,800. A disk gives more if asked for several at once: 900, 1,080.
TASK_BYTES = 64 * 1024 * 1024
DISK_TASK_BYTES = 1024 * 1024
DISK_PACE = 1 / 500e6  # seconds a byte in one thread: memory takes a quarter, disks and networks twice as long or more


BYTES = np.dtype(np.uint8)
# NumPy has no bfloat16.
KINDS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.int16),
}


@dataclass(slots=True, repr=False)
class Tensors:
    """One tensor of every slot. `whole`: all of them in one block: `B C t h w` of the stored type, or if they differ in shape uint8, cut at
    `bounds`; None if each has its own bytes in `apart`.
    """

    whole: torch.Tensor | None
    bounds: list[int]
    apart: list[torch.Tensor]

    def part(self, i: int) -> torch.Tensor:
        """Of the i-th slot."""
        return self.apart[i] if self.whole is None else self.whole[self.bounds[i] : self.bounds[i + 1]]


class Layout(NamedTuple):
    """What memory one tensor of every slot needs. `sizes`: bytes of each. `shape`: `C t h w` of all of them, None if they differ.
    `apart`: each has its own. `image`: files of any length.
    """

    sizes: list[int]
    shape: tuple[int, ...] | None
    apart: bool
    image: bool


class ReadPlan(NamedTuple):
    """What is read for slots: a `Layout` for each tensor of a row, and ranges of files. Holds no memory, so that it may be made early and
    used twice.
    """

    layouts: list[Layout]
    spans: list[Span]


class Failure(NamedTuple):
    """A tensor that could not be read as it was written."""

    item: Wanted
    error: InputError


class BatchReader:
    """Reads slots of one dataset. Safe for several threads.

    Args:
        fetcher: reads from the store.
        finder: finds another row for one that is damaged.
        memory: of batches.
        pool: threads that read.
        stats: what to count in.
        tensors: numbers in the index of what is read of a row, the mean first. images: those of them that are files of any length.
        stored: type of the values.
        decoder: of tensors whose stored bytes are not the values, else None.
        verify: check the hash of what comes from the store, and of what comes from the cache.
        replace: draw another row in place of a damaged one, rather than stop.
        cache: local copies, or None.
        stopped: set when nothing more is to be read.
        together: bytes of tensors far apart that one thread reads in turn; 0 where each read waits for the network.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        finder: SlotFinder,
        memory: BatchMemory,
        pool: Executor,
        stats: LoaderStats,
        *,
        tensors: Sequence[int],
        images: Sequence[int] = (),
        stored: str,
        decoder: Decoder | None = None,
        verify: tuple[bool, bool],
        replace: bool,
        cache: TensorCache | None,
        together: int,
        stopped: Event,
    ) -> None:
        import torch

        self._fetcher, self._finder, self._memory = fetcher, finder, memory
        self._pool, self._stats, self._tensors, self._stored = pool, stats, tensors, stored
        self._verify, self._verify_cached = verify
        self._replace, self._cache, self._together, self._stopped = replace, cache, together, stopped
        self._torch, self._images, self._decoder = torch, images, decoder
        self._checked = verify[0] or cache is not None
        self._pace = 0.0  # seconds a byte in one thread, of late

    def plan(self, slots: Sequence[Slot], *, apart: bool, alike: bool) -> ReadPlan:
        """What to read for slots. The tensors of all slots lie one after another in one block of memory; with `apart` each has its own,
        which rows of unequal length need if one may replace another. `alike`: all have one shape.
        """
        layouts = [self._layout(slots, which, apart=apart, alike=alike) for which in self._tensors]
        return ReadPlan(layouts, spans_of(self._wanted(slots, range(len(slots)))))

    def read(self, slots: list[Slot], plan: ReadPlan, epoch: int) -> list[Tensors]:
        """For each tensor of a row that is read those of every slot, in order. A damaged slot is replaced in `slots`.

        Raises:
            InputError: damaged, and not to be replaced; no row left in the bucket.
            StorageUnavailable: the store failed for too long; names file and range.
        """
        count, blocks = len(slots), []
        memory: list[memoryview] = []
        for layout in plan.layouts:
            block, views = self._block(layout)
            blocks.append(block)
            memory += views
        spans = plan.spans
        while failures := self._fill(spans, memory):
            failed = {item.place % count: error for item, error in reversed(failures)}  # the first of each slot
            for i, error in sorted(failed.items()):
                if not self._replace:
                    raise error
                self._stats.add_damage(error.message)
                slots[i] = self._finder.replacement(slots[i], epoch)
                for number, (which, block) in enumerate(zip(self._tensors, blocks, strict=True)):
                    if block.whole is None:
                        made, (view,) = self._block(self._layout([slots[i]], which, apart=True, alike=False))
                        block.apart[i], memory[number * count + i] = made.apart[0], view
            spans = spans_of(self._wanted(slots, sorted(failed)))
        return blocks

    def _wanted(self, slots: Sequence[Slot], numbers: Iterable[int]) -> list[Wanted]:
        """The tensors of some of the slots. Memory is in order of tensors, then of slots."""
        return [
            Wanted.of(slots[i].file, slots[i].index, slots[i].position, which, number * len(slots) + i)
            for i in numbers
            for number, which in enumerate(self._tensors)
        ]

    def stacked(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of one shape as one, copied into memory of batches."""
        first = latents[0]
        made, _ = self._taken((len(latents), *first.shape), KINDS[self._stored])
        for place, latent in zip(made, latents, strict=True):
            place.copy_(latent)
        return made

    def _taken(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> tuple[torch.Tensor, memoryview]:
        """A tensor in memory of batches, and its bytes."""
        array = self._memory.take(shape, kind)
        tensor = self._torch.from_numpy(array)
        if kind == KINDS["bfloat16"]:
            tensor = tensor.view(self._torch.bfloat16)
        return tensor, array.data.cast("B")

    def _layout(self, slots: Sequence[Slot], which: int, *, apart: bool, alike: bool) -> Layout:
        length = FileIndex.length if self._decoder is None else self._decoder.length
        sizes = [length(slot.index, slot.position, which) for slot in slots]
        image = which in self._images
        shape = slots[0].index.shape(slots[0].position, which) if alike and not image else None
        return Layout(sizes, shape, apart, image)

    def _block(self, layout: Layout) -> tuple[Tensors, list[memoryview]]:
        """Memory of a layout, and its bytes for each slot."""
        sizes = layout.sizes
        if layout.image:  # not in memory of batches, whose blocks of other sizes would go
            images = [self._torch.empty(size, dtype=self._torch.uint8) for size in sizes]
            return Tensors(None, [], images), [image.numpy().data for image in images]
        if layout.apart:
            taken = [self._taken((size,), BYTES) for size in sizes]
            return Tensors(None, [], [tensor for tensor, _ in taken]), [view for _, view in taken]
        bounds = [0, *accumulate(sizes)]
        if layout.shape is not None:
            whole, view = self._taken((len(sizes), *layout.shape), KINDS[self._stored])
        else:
            whole, view = self._taken((bounds[-1],), BYTES)
        return Tensors(whole, bounds, []), [view[begin:end] for begin, end in pairwise(bounds)]

    def _fill(self, spans: list[Span], values: list[memoryview]) -> list[Failure]:
        """Reads, and decodes into `values`, which are by place. Returns what could not be."""
        stored = values
        if self._decoder is not None:
            stored = self._decoder.stored([item for span in spans for item in span.members], values)
        groups: list[list[Span]] = []
        size = 0
        # Hashing and decoding do not need the interpreter.
        spread = self._checked or self._decoder is not None or self._pace > DISK_PACE
        together = min(self._together, DISK_TASK_BYTES) if spread else self._together
        for span in spans:
            if not groups or size >= together:
                groups.append([])
                size = 0
            groups[-1].append(span)
            size += span.stop - span.start
        # Local reads are short: this thread takes part rather than wait. Over a network it would hold up one of the others.
        mine = groups[:1] if self._together else groups[: int(len(groups) == 1)]
        futures = [self._pool.submit(self._read, group, stored, values) for group in groups[len(mine) :]]
        found = [failure for group in mine for failure in self._read(group, stored, values)]
        for future in futures:
            found += future.result()
        return found

    def _read(self, spans: list[Span], stored: list[memoryview], values: list[memoryview]) -> list[Failure]:
        began = time.perf_counter()
        failed: list[Failure] = []
        items = [] if self._decoder is None else [item for span in spans for item in span.members]
        if self._cache is not None:
            missing = [
                item for span in spans for item in span.members if not self._from_cache(item, stored[item.place])
            ]
            spans = spans_of(missing)
        for part in ([span] for span in spans) if self._checked else [spans]:  # checked while in the processor's cache
            cut = self._fetcher.read(part, stored, self._stopped.is_set)
            failed += [Failure(item, self._fetcher.cut(item)) for item in cut]
            for item in part[0].members if self._checked else ():
                if item in cut:
                    continue
                error = self._fetcher.damage(item, stored[item.place]) if self._verify else None
                if error is not None:
                    failed.append(Failure(item, error))
                elif self._cache is not None:
                    self._cache.put(item.index.hash(item.row, item.tensor), stored[item.place])
        if self._decoder is not None:
            unread = [failure.item for failure in failed]
            good = [item for item in items if item not in unread]
            found = [(item, self._decoder.decode(item, stored, values, self._fetcher)) for item in good]
            failed += [Failure(item, error) for item, error in found if error is not None]
        seconds, size = time.perf_counter() - began, sum([item.length for span in spans for item in span.members])
        if size:
            self._pace += (seconds / size - self._pace) / 8  # another thread's may be lost, which does no harm
        self._stats.add(read_s=seconds, bytes=size, tensors=sum([len(span.members) for span in spans]))
        return failed

    def _from_cache(self, item: Wanted, view: memoryview) -> bool:
        if self._cache is None or not self._cache.read(item.index.hash(item.row, item.tensor), view):
            self._stats.add(cache_misses=1)
            return False
        if self._verify_cached and self._fetcher.damage(item, view) is not None:
            self._cache.forget(item.index.hash(item.row, item.tensor))
            self._stats.add(cache_misses=1)
            return False
        self._stats.add(cache_hits=1)
        return True

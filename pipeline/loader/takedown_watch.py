"""Takedowns that are recorded during a run, applied between two steps.

Ranks that share samples (sequence, tensor or context parallel: the same `dp_rank`) must hide the same rows at the same step: their first
rank looks for all of them, and all apply what it found at the same steps. Ranks with samples of their own look by their own clocks.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, LatheError, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from torch.distributed import ProcessGroup

    from pipeline.ledger.takedowns import Takedowns
    from pipeline.loader.dataset import LatentDataset

AGREE_STEPS = 50  # steps between those at which ranks that share samples apply the same takedowns


class TakedownWatch:
    """Looks every `every_s` seconds, in a thread of `pool`. `peers`: group of the ranks that share samples, or None."""

    def __init__(
        self, datasets: Sequence[LatentDataset], pool: Executor, every_s: float, peers: ProcessGroup | None
    ) -> None:
        self._datasets, self._pool, self._every_s = datasets, pool, every_s
        self._looked = time.monotonic()
        self._look: Future[list[Takedowns]] | None = None
        self._began_with: list[Takedowns] = []  # what was applied when `_look` began
        self._seen = self._applied()
        self._peers = None if peers is None else _Peers(peers)

    def changed(self, step: int) -> bool:
        """Whether takedowns were applied since the last call, to any dataset by any loader; call before each step.

        Raises:
            OutputError: a record that cannot be read. Training must stop: it would use rows that were taken down.
        """
        if self._peers is None:
            self._apply(self._finished())
            self._start()
        else:
            if self._peers.first:
                self._peers.found(self._finished)
                self._start()
            self._apply(self._peers.agreed(step, self._seen))
        before, self._seen = self._seen, self._applied()
        return _differ(before, self._seen)

    def look(self) -> None:
        """Looks now and waits for it. With `peers`, all of them must call it; it takes effect at the next step on all.

        Raises:
            OutputError: a record that cannot be read.
            StorageUnavailable: the store does not answer.
        """
        if self._peers is None:
            self._apply(self._read())
        elif self._peers.first:
            self._peers.found(self._read)
        if self._peers is not None:
            self._peers.due = True
        self._look = None  # it began earlier, and may lack what was found now

    def _finished(self) -> list[Takedowns] | None:
        """What a look has found that is done. None if others were applied since it began, by another loader: it may lack these."""
        if self._look is None or not self._look.done():
            return None
        done, self._look = self._look, None
        if _differ(self._began_with, self._applied()):
            self._looked = -math.inf  # look again at once
            return None
        with suppress(StorageUnavailable):  # the next look finds them; reads of latents say so if the store stays away
            return done.result()
        return None

    def _start(self) -> None:
        """Starts the next look when it is time: after `_apply`, so that it reads only records that are not known."""
        if self._look is None and time.monotonic() - self._looked >= self._every_s:
            self._looked, self._began_with = time.monotonic(), self._applied()
            self._look = self._pool.submit(self._read)

    def _applied(self) -> list[Takedowns]:
        return [dataset.takedowns for dataset in self._datasets]

    def _read(self) -> list[Takedowns]:
        return [dataset.read_takedowns() for dataset in self._datasets]

    def _apply(self, found: list[Takedowns] | None) -> None:
        for dataset, takedowns in zip(self._datasets, found or (), strict=False):
            dataset.apply_takedowns(takedowns)


def _differ(one: list[Takedowns], other: list[Takedowns]) -> bool:
    return any(mine is not theirs for mine, theirs in zip(one, other, strict=True))


class _Peers:
    """Ranks of a group, of which the first one decides. `due`: agree at the next step whatever its number."""

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError(f"peers: expected a group of torch.distributed that has this rank, got {group!r}")
        self._dist, self._group = dist, group
        self._source = dist.get_process_group_ranks(group)[0]
        self.first = dist.get_rank() == self._source
        self.due = True
        self._next: list[Takedowns] | LatheError | None = None

    def found(self, look: Any) -> None:
        """Remembers what a look of the first rank gave, also an error, which all ranks must raise: the others would wait for it."""
        try:
            self._next = look() or self._next
        except LatheError as error:
            self._next = error

    def agreed(self, step: int, present: list[Takedowns]) -> list[Takedowns] | None:
        """What all apply at this step, the same on all ranks; None for no change."""
        if step % AGREE_STEPS and not self.due:
            return None
        sent: list[Any] = [(self._next or present) if self.due else self._next]
        self.due, self._next = False, None
        self._dist.broadcast_object_list(sent, src=self._source, group=self._group)
        if isinstance(sent[0], LatheError):
            raise sent[0]
        found: list[Takedowns] | None = sent[0]
        return found

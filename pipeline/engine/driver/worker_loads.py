"""Which worker can take a shard: how many each holds, which are kept for a suspect, which rest after a disk error. No clock, no I/O."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipeline.engine.driver.worker_disks import WorkerDisks

if TYPE_CHECKING:
    from collections.abc import Container


class WorkerLoads:
    """Workers of a build. Each holds up to `credit` shards. Calls cost O(credit); of suspects, `disks_failing_since` O(workers)."""

    def __init__(self, credit: int) -> None:
        self._credit = credit
        self._held: dict[str, set[str]] = {}  # worker -> shards
        self._node: dict[str, str] = {}  # worker -> where it runs; "" if that is unknown
        self._on_node: Counter[str] = Counter()
        # Workers that take shards, by how many they hold; a dict keeps the order in which they came to hold that many.
        self._by_load: list[dict[str, None]] = [{} for _ in range(credit + 1)]
        self._closed: set[str] = set()  # get nothing more until they hold nothing
        self._reserved: set[str] = set()  # closed for a suspect that waits
        self._leaving: set[str] = set()  # get nothing more at all
        self.disks = WorkerDisks()

    def add(self, worker: str, node: str = "") -> None:
        """A worker on `node` is ready for shards."""
        if worker not in self._held:
            self._held[worker] = set()
            self._node[worker] = node
            self._on_node[node] += 1
            self._place(worker)

    def remove(self, worker: str) -> None:
        """A worker is gone."""
        self.disks.forget(worker)
        if self._held.pop(worker, None) is not None:
            node = self._node.pop(worker)
            self._on_node -= Counter([node])
        self._leaving.discard(worker)
        self._place(worker)
        self._open(worker)

    def leave(self, worker: str) -> None:
        """The worker gets no further shard: its node goes away."""
        if worker in self._held:
            self._leaving.add(worker)
            self._place(worker)

    def node(self, worker: str) -> str:
        """The worker's node; "" if that is unknown."""
        return self._node.get(worker, "")

    def held(self, worker: str) -> list[str]:
        """Shards that the worker holds, sorted."""
        return sorted(self._held.get(worker, ()))

    def give(self, worker: str, shard_id: str) -> None:
        """The worker holds one more shard."""
        self._held[worker].add(shard_id)
        self._place(worker)

    def take(self, worker: str, shard_id: str) -> None:
        """The worker, if it is not gone, holds the shard no longer."""
        if worker in self._held:
            self._held[worker].discard(shard_id)
            self._place(worker)

    def idle(self) -> str | None:
        """A worker without shards."""
        return next(iter(self._by_load[0]), None)

    def idle_elsewhere(self, nodes: Container[str]) -> str | None:
        """A worker without shards on a node outside `nodes`; on any node if all workers share one, or if nodes are unknown."""
        if len(self._on_node) <= 1:
            return self.idle()
        return next(
            (worker for worker in self._by_load[0] if not self._node[worker] or self._node[worker] not in nodes), None
        )

    def idle_for_suspect(self, lost_on: Container[str]) -> str | None:
        """A worker without shards, outside these nodes if some worker outside them is or will be idle.

        A sick node's replacement is often idle first, and a second death there would blame the shard or its video.
        """
        worker = self.idle_elsewhere(lost_on)
        return self.idle() if worker is None and not self._serves_elsewhere(lost_on) else worker

    def least_busy(self) -> str | None:
        """A worker that can take a shard: one without shards as long as there is one."""
        return self._first(range(self._credit))

    def close(self, worker: str) -> None:
        """The worker gets no further shard until it holds none."""
        self._closed.add(worker)
        self._place(worker)

    def reserve(self, count: int, lost_on: Container[str] = ()) -> None:
        """Closes workers that hold the fewest shards until `count` are closed for suspects that wait; if it can be, not on these nodes."""
        elsewhere = bool(lost_on) and self._serves_elsewhere(lost_on)
        while len(self._reserved) < count:
            loads = (worker for load in self._by_load[1:] for worker in load)
            worker = next((worker for worker in loads if not (elsewhere and self._node[worker] in lost_on)), None)
            if worker is None:
                return
            self._reserved.add(worker)
            self.close(worker)

    # --- disks --------------------------------------------------------------------------------------------------------

    def disk_failed(self, worker: str, shard_id: str, now: float) -> bool:
        """The worker's temporary folder failed, and it rests. True if the failure counts against the shard."""
        return self.disks.failed(worker, shard_id, now, workers=len(self._held))

    def end_rests(self, now: float) -> None:
        """Workers whose rest is over take shards again."""
        for worker in self.disks.rested(now):
            self._place(worker)

    @property
    def disks_failing_since(self) -> float | None:
        """Since when the temporary folder of every worker fails; None if one works."""
        return self.disks.since if self._held and self.disks.failing(self._held) else None

    # ------------------------------------------------------------------------------------------------------------------

    def _serves_elsewhere(self, nodes: Container[str]) -> bool:
        """Whether a worker outside these nodes will be idle once it has done what it holds. Costs O(workers)."""
        return any(
            node not in nodes and worker not in self._leaving and not self.disks.rests(worker)
            for worker, node in self._node.items()
        )

    def _first(self, loads: range) -> str | None:
        return next((next(iter(self._by_load[load])) for load in loads if self._by_load[load]), None)

    def _place(self, worker: str) -> None:
        """Puts the worker where it belongs after its shards or its state have changed."""
        held = self._held.get(worker)
        for bucket in self._by_load:
            bucket.pop(worker, None)
        if held is None:
            return
        if not held:
            self._open(worker)
        if worker not in self._closed and worker not in self._leaving and not self.disks.rests(worker):
            self._by_load[len(held)][worker] = None

    def _open(self, worker: str) -> None:
        self._closed.discard(worker)
        self._reserved.discard(worker)

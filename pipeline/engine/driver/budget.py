"""Limits of one build: hours, shards, GPU hours. Values in, a reason out; and what the caller of `encode` may decide about its build.

A build that reaches a limit finishes its running shards; the same command goes on with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import Shard

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a build has used so far. `encoder_s`: seconds that its encoders were up, summed; each has one GPU, or is on a CPU."""

    wall_s: float
    shards: int
    encoder_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Most that one build may use; None: no limit."""

    hours: float | None = None
    shards: int | None = None
    gpu_hours: float | None = None

    def exhausted(self, spent: Spent) -> str | None:
        """Why no further shard may be started; None if one may."""
        if self.shards is not None and spent.shards >= self.shards:
            return self.shards_reached()
        if self.hours is not None and spent.wall_s >= self.hours * HOUR_S:
            return f"max_hours={self.hours:g} reached after {spent.wall_s / HOUR_S:.2f} hours"
        if self.gpu_hours is not None and spent.encoder_s >= self.gpu_hours * HOUR_S:
            return (
                f"max_gpu_hours={self.gpu_hours:g} reached: encoders were up for {spent.encoder_s / HOUR_S:.2f} hours"
            )
        return None

    def admitted(self, todo: Sequence[Shard]) -> list[Shard]:
        """The shards that this build may start, in order."""
        return list(todo if self.shards is None else todo[: self.shards])

    def shards_reached(self) -> str:
        """The reason for which shards beyond `admitted` are left."""
        return f"max_shards={self.shards} reached"


class UpTime:
    """Seconds that encoders were up, summed over all that came and went. Times are of time.monotonic(). Every call costs O(1): the driver
    reads the sum after each event, of up to 1,000 encoders.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._since_sum = 0.0  # of the encoders that are up
        self._ended_s = 0.0

    def add(self, worker: str, now: float) -> None:
        """An encoder is up."""
        self._since_sum += now - self._since.get(worker, 0.0)
        self._since[worker] = now

    def remove(self, worker: str, now: float) -> None:
        """An encoder is gone; one that never was up counts nothing."""
        since = self._since.pop(worker, None)
        if since is not None:
            self._ended_s += now - since
            self._since_sum -= since

    def seconds(self, now: float) -> float:
        """The sum up to `now`."""
        return self._ended_s + len(self._since) * now - self._since_sum


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build is about to do, before anything is started."""

    fingerprint: str
    fingerprint_parts: dict[str, Any]
    listed: Sequence[Shard]  # the inputs as they are now
    receipts: Sequence[ReceiptSummary]  # all of the output, of any fingerprint
    todo: Sequence[Shard]
    overlaps: bool  # whether some listed input, in any version, was encoded before under this fingerprint


class Control(Protocol):
    """Decisions of the caller of `encode` about its build."""

    budget: Budget

    def approve(self, plan: BuildPlan) -> None:
        """Called before anything is started; an exception refuses the build."""
        ...

    def check(self) -> None:
        """Called twice a second; must not wait. An exception ends the build at once."""
        ...


class Unlimited:
    """No limits: the default of `encode`."""

    budget = Budget()

    def approve(self, plan: BuildPlan) -> None:  # noqa: D102
        pass

    def check(self) -> None:  # noqa: D102
        pass

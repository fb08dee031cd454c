"""Videos in whose encode step a worker ended: named by their source, and what the next attempt at their shard does about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepVideo:
    """A video that takes part in an encode step."""

    shard_id: str
    uri: str
    key: str


@dataclass(frozen=True, slots=True)
class BlamedVideo:
    """A video that was in the step when a worker ended by its own work, `deaths` times.

    The next attempt encodes it in steps of its own, so that another death names it alone; with `drop` it rejects the video instead.
    """

    uri: str
    key: str
    deaths: int
    drop: bool
    why: str  # the last loss, one line

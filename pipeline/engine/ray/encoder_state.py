"""What `RayPool` knows of each encoder actor, and of a call to one. Times are on the pool's attended clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.engine.ray.actors import Place
    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.records import Shard


@dataclass(slots=True)
class EncoderState:
    """One encoder, from its creation until its loss is reported."""

    name: str
    actor: Any
    created_at: float
    avoided: tuple[str, ...] = ()  # nodes that it may not be placed on
    place: Place | None = None
    up: bool = False
    shards: dict[int, tuple[Shard, tuple[BlamedVideo, ...]]] = field(default_factory=dict)  # by ticket
    pulse_out: bool = False
    alive_at: float = 0.0  # last sign of progress, since it has a node
    progress: int = -1  # the worker's own count at its last pulse
    unavailable_since: float | None = None
    lost: Exception | None = None  # it is gone, and its record is being read
    lost_at: float = 0.0
    drained_at: float | None = None  # the last report that its node goes away
    leaving: bool = False  # it holds nothing and was told to end


@dataclass(frozen=True, slots=True)
class Call:
    """A method call of an actor. `ticket` numbers the assignment of a `run_shard`."""

    worker: str
    method: str
    ticket: int = 0

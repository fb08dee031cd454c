"""What a feed knows of a decoder lane and of the sample it decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.records import OpenedVideo, Sample


@dataclass(frozen=True, slots=True)
class Job:
    """A sample to decode and the decoders it has lost so far."""

    owner: Any
    sample: Sample
    deaths: int = 0  # by its own work
    kills: int = 0  # from outside
    not_before: float = 0.0


@dataclass(slots=True)
class LaneState:
    """One lane: whether its process is up, what it decodes, what was asked of it and since when."""

    ready: bool = False  # its process is up
    restart_at: float | None = None  # its process died on start-up, and the next one starts then
    job: Job | None = None  # None: idle
    ticket: int = 0
    opened: OpenedVideo | None = None
    asked: int = 0  # answers outstanding
    chunk_bytes: int = 0  # largest answer to expect
    enough_bytes: int = 0  # chunks like these that keep the encoder busy
    answered_at: float = 0.0
    read_s: float = 0.0  # of the time since then, inside reads of the video's file
    started_at: float = 0.0  # the process, while it is not up

    def heard(self, now: float) -> None:
        """The time limit begins again."""
        self.answered_at, self.read_s = now, 0.0

    @property
    def idle(self) -> bool:
        """Whether it can take a sample."""
        return self.ready and self.job is None

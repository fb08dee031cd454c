"""State that the feed keeps of one decoder lane, and of the sample it decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.records import OpenedVideo, Sample


@dataclass(frozen=True, slots=True)
class Job:
    """A sample to decode, and how many decoders were lost on it so far."""

    owner: Any
    sample: Sample
    deaths: int = 0  # decoders that the sample ended
    kills: int = 0  # decoders killed from outside
    not_before: float = 0.0  # on the feed's clock


@dataclass(slots=True)
class LaneState:
    """One lane: its process, the sample it decodes, the answers it owes and since when."""

    ready: bool = False  # its process is up
    restart_at: float | None = None  # its process died on start-up; time of the next start
    job: Job | None = None  # None: idle
    ticket: int = 0
    opened: OpenedVideo | None = None
    asked: int = 0  # answers outstanding
    chunk_bytes: int = 0  # largest answer to expect
    enough_bytes: int = 0  # decoded bytes that keep the encoder busy
    answered_at: float = 0.0
    read_s: float = 0.0  # seconds since `answered_at` spent inside reads of the video's file
    started_at: float = 0.0  # start of the process, while it is not up

    def restart_time_limit(self, now: float) -> None:
        """The time limit of the next answer begins at `now`."""
        self.answered_at, self.read_s = now, 0.0

    @property
    def idle(self) -> bool:
        """Whether it can take a sample."""
        return self.ready and self.job is None

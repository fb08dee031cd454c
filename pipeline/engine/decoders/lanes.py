"""Interface of a set of decoder lanes: requests and pulls in, answers out, each tagged with its lane and ticket.

A lane is a process that decodes one video at a time and may be killed. One that dies is reported, and replaced on request; the feed drops
answers that carry an earlier ticket. `ProcessLanes` are children of this process; `RayLanes` (engine/ray/lanes.py) are Ray actors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import LatheError
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, StillOpening, VideoEnded

if TYPE_CHECKING:
    from pipeline.video.cutting import CutRequest


@dataclass(frozen=True, slots=True)
class LaneReady:
    """The lane's process is up (again) and idle."""


Answer = LaneReady | StillOpening | OpenedVideo | FrameChunk | ClipFailed | VideoEnded | LatheError


class Lanes(Protocol):
    """A set of decoder processes. Calls return at once; answers come from `wait`, in order per lane."""

    count: int
    start_limit_s: float  # for a process to be up; inf where it may have to wait for a node

    def open(self, lane: int, ticket: int, request: CutRequest) -> None:
        """Starts a video; the answer is `OpenedVideo`, `StillOpening` (ask again by `pull`) or a `LatheError`. The lane drops the video
        before it.
        """
        ...

    def pull(self, lane: int, ticket: int) -> None:
        """Asks for one more `FrameChunk`, `ClipFailed` or `VideoEnded`."""
        ...

    def wait(self, timeout_s: float) -> list[tuple[int, int, Answer]]:
        """Answers that have arrived, `(lane, ticket, answer)`; waits up to `timeout_s` for the first.

        `WorkerLost` with ticket -1: the lane died; its `blame` says whether its own work caused that.
        """
        ...

    def receiving(self, lane: int) -> bool:
        """Whether the video is still being sent to the lane, so that the lane cannot decode it yet."""
        ...

    def reading(self, lane: int) -> bool:
        """Whether the lane's process is inside a read of its video's file right now; False where that cannot be known."""
        ...

    def restart(self, lane: int) -> None:
        """Kills the lane's process and starts another; `LaneReady` or `WorkerLost` follows."""
        ...

    def close(self) -> None:
        """Kills all processes; later calls do nothing. Other threads may still be inside the methods above."""
        ...


def niceness_beside(device: str) -> int:
    """Niceness of decoders beside a network on `device`. They yield to a CPU encoder, whose threads all wait if one is descheduled.

    While the encoder waits for frames it sleeps, and decoders get whole cores at any niceness. Beside a GPU they need not yield.
    """
    return 10 if device == "cpu" else 0

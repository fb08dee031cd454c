"""Which frames of a stream are damaged, learned while it is decoded. Part of the decode package.

A decoder meets damage in one packet, but what it gives afterwards is built on it, up to the next point where pictures stand
by themselves. So damage lasts from the first frame it can have reached to the frame of the next point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.decode.packets import PacketTable


class DamagedFrames:
    """Ranges of frames, each with what was seen. `reach`: how many frames on either side are made from a frame."""

    def __init__(self, table: PacketTable, reach: int) -> None:
        self._points = table.points
        self._count = len(table.times_s)
        self._reach = reach
        self._ranges: list[tuple[int, int, str]] = []  # first, end, why

    def undecodable(self, packet: int, position: int, error: Exception) -> None:
        """The decoder refused a packet after it had given frame `position`."""
        at = int(np.searchsorted(self._points.packets, packet, side="right"))
        begins = int(self._points.frames[at - 1]) if at else 0
        end = int(self._points.frames[at]) if at < len(self._points.frames) else self._count
        text = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        self._add(max(position + 1, begins), end, f"packet {packet} cannot be decoded ({text})")

    def flagged(self, frame: int) -> None:
        """The decoder says itself that a frame is corrupt."""
        self._add(frame, self._next_point(frame), f"the decoder found frame {frame} corrupt and concealed it")

    def lost(self, frame: int) -> None:
        """The decoder gave nothing for a frame."""
        self._add(frame, self._next_point(frame), f"the decoder gave nothing for frame {frame}")

    @property
    def first(self) -> str | None:
        """What was seen first, in words."""
        return self._ranges[0][2] if self._ranges else None

    def why(self, frame: int) -> str | None:
        """What happened to a frame, in words; None if nothing is known to have."""
        for first, end, text in reversed(self._ranges):
            if first - self._reach <= frame < end + self._reach:
                last = min(end, self._count) - 1
                return f"{text}; frames {first} to {last} depend on it"
        return None

    def _next_point(self, frame: int) -> int:
        at = int(np.searchsorted(self._points.frames, frame, side="right"))
        return int(self._points.frames[at]) if at < len(self._points.frames) else self._count

    def _add(self, first: int, end: int, text: str) -> None:
        if self._ranges and self._ranges[-1][0] <= first and end <= self._ranges[-1][1]:
            return  # known: only what is new is kept, since every packet may be damaged
        self._ranges.append((first, max(end, first + 1), text))

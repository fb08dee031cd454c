"""Record of the damaged frames of a stream, filled while it is decoded. Part of the decode package.

Damage is found in one packet. Later packets are predicted from it, up to the next point where pictures are independent. So the damage
lasts from the earliest frame of these packets to the frame of that point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.video.decode.container import error_text

if TYPE_CHECKING:
    from pipeline.video.decode.packet_table import PacketTable


class DamagedFrames:
    """Ranges of damaged frames, each with the reason. `reach`: frames on either side that a filter makes from a frame."""

    def __init__(self, table: PacketTable, reach: int) -> None:
        """Starts with the frames behind a join of recordings: they are predicted from pictures that the stream does not hold."""
        self._points, self._frames_N = table.points, table.frames_N
        self._count = len(table.times_s)
        self._reach = reach
        self._ranges: list[tuple[int, int, str]] = []  # first frame, end, reason
        self.first: str | None = None  # reason of the first damage found
        for packet in table.joins:
            at = int(np.searchsorted(self._points.packets, packet))
            first, end = self._reached(packet, at + 1), self._frame_of(at)
            if first < end:
                self._add(
                    first, end, f"the clock breaks at frame {first}, and the stream does not go on with a keyframe"
                )
        for packet in table.gaps:
            self._from(packet, f"pictures before packet {packet} are missing, and it is predicted from them")

    def undecodable(self, packet: int, error: Exception) -> None:
        """The decoder refused a packet."""
        self._from(packet, f"packet {packet} cannot be decoded ({error_text(error)})")

    def concealed(self, packet: int) -> None:
        """The decoder flagged the frame of a packet as corrupt."""
        self._from(packet, f"the decoder found packet {packet} corrupt and concealed it")

    def lost(self, packet: int) -> None:
        """The decoder returned no frame for a packet."""
        self._from(packet, f"the decoder gave no frame for packet {packet}")

    def why(self, frame: int) -> str | None:
        """Why a frame is damaged, as text; None if it is not known to be. Frames must be asked for in ascending order."""
        while len(self._ranges) > 1 and self._ranges[0][1] + self._reach <= frame:
            del self._ranges[0]
        for first, end, text in self._ranges:
            if first - self._reach <= frame < end + self._reach:
                return f"{text}; frames {first} to {end - 1} depend on it"
        return None

    def end_of(self, frame: int) -> int:
        """The first frame from `frame` on that is not known to be damaged."""
        for first, end, _ in sorted(self._ranges):
            if first - self._reach <= frame < end + self._reach:
                frame = end + self._reach
        return frame

    def group_of(self, frame: int) -> int:
        """The frame of the last point up to `frame`."""
        at = int(np.searchsorted(self._points.frames, frame, side="right"))
        return int(self._points.frames[at - 1]) if at else 0

    def _from(self, packet: int, text: str) -> None:
        at = int(np.searchsorted(self._points.packets, packet, side="right"))
        first, end = self._reached(packet, at), self._frame_of(at)
        if at and 0 <= self._frames_N[packet] < self._frame_of(at - 1):
            end = self._frame_of(
                at - 1
            )  # shown before the point that it follows: nothing behind that is predicted from it
        self._add(first, max(end, first + 1), text)

    def _reached(self, packet: int, at: int) -> int:
        """The earliest frame of the packets from `packet` to point `at`."""
        frames = self._frames_N[packet : self._packet_of(at)]
        frames = frames[frames >= 0]
        return int(frames.min()) if len(frames) else self._frame_of(at)

    def _packet_of(self, at: int) -> int:
        packets = self._points.packets
        return int(packets[at]) if at < len(packets) else len(self._frames_N)

    def _frame_of(self, at: int) -> int:
        frames = self._points.frames
        return int(frames[at]) if at < len(frames) else self._count

    def _add(self, first: int, end: int, text: str) -> None:
        self.first = self.first or text
        if not any(begin <= first and end <= known for begin, known, _ in self._ranges[-2:]):
            self._ranges.append((first, end, text))  # only what is new: all packets may be damaged

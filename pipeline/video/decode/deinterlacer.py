"""Deinterlacing of a frame stream: one progressive frame for each interlaced one. Part of the decode package."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pipeline.video.decode.filtering import FilterChain

BWDIF = [("bwdif", "mode=send_frame:parity=auto:deint=interlaced")]
REACH = 2  # frames on either side that bwdif uses: a jump lands this many frames earlier


class Deinterlacer:
    """libav's bwdif for frames flagged as interlaced; the others pass unchanged."""

    def __init__(self, stream: Any) -> None:
        """Uses the time base of `stream` for frames without one. The filter is built for the size of a frame, not the header's."""
        self._time_base = stream.time_base or Fraction(1, 1000)
        self._chain: FilterChain | None = None
        self._shape: tuple[int, int, str] | None = None

    def push(self, frame: Any | None) -> list[Any]:
        """Takes a frame, or None at the end; returns the frames that are ready."""
        if frame is None:
            return [] if self._chain is None else self._chain.push(None)
        drained: list[Any] = []
        shape = frame.width, frame.height, frame.format.name
        if self._chain is None or shape != self._shape:
            # bwdif reads every frame with the size and format that it was built for, also beyond the end of a smaller one.
            if self._chain is None:
                self._time_base = frame.time_base or self._time_base
            else:
                drained = self._chain.push(None)
            self._chain, self._shape = FilterChain(frame, BWDIF, self._time_base), shape
        return drained + self._chain.push(frame)

    def stamp(self, frame: Any) -> int:
        """The time that `frame` had before: bwdif halves the time base."""
        if frame.time_base and frame.time_base != self._time_base:
            return round(frame.pts * frame.time_base / self._time_base)
        return int(frame.pts)

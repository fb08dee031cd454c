"""Interlaced frames become progressive ones, one for one. Part of the decode package."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from av.error import BlockingIOError as NeedsInput
from av.error import EOFError as FilterEnded
from av.filter import Graph

REACH = 2  # bwdif looks at neighbouring frames: a jump lands this many frames earlier


class Deinterlacer:
    """bwdif on frames that are flagged as interlaced; the others pass unchanged."""

    def __init__(self, stream: Any) -> None:
        """Takes the time base of `stream`; the graph is built from the first frame, since sizes may differ from the
        header's.
        """
        self._time_base = stream.time_base or Fraction(1, 1000)
        self._graph: Graph | None = None

    def push(self, frame: Any | None) -> list[Any]:
        """Gives a frame in (None: no more come) and takes out what is ready."""
        if self._graph is None:
            if frame is None:
                return []
            self._graph = self._build(frame)
        self._graph.vpush(frame)
        ready = []
        while True:
            try:
                ready.append(self._graph.vpull())
            except (NeedsInput, FilterEnded):
                return ready

    def stamp(self, frame: Any) -> int:
        """The time that `frame` went in with: bwdif halves the time base."""
        if frame.time_base and frame.time_base != self._time_base:
            return round(frame.pts * frame.time_base / self._time_base)
        return int(frame.pts)

    def _build(self, frame: Any) -> Graph:
        graph = Graph()
        graph.threads = 1
        self._time_base = frame.time_base or self._time_base
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self._time_base
        )
        bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        sink = graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        graph.configure()
        return graph

"""Chains of libav filters for the frames of a video. Part of the decode package."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from av.error import BlockingIOError as NeedsInput
from av.error import EOFError as FilterEnded
from av.filter import Graph

ANY_TIME_BASE = Fraction(1, 1000)  # libav needs one; filters of single frames ignore times


class FilterChain:
    """Filters in a row, for frames of the size and pixel format of `frame`."""

    def __init__(self, frame: Any, filters: Iterable[tuple[str, str]], time_base: Fraction | None = None) -> None:
        """`filters` are (name, arguments) of libav; `time_base` is by default the frame's. Raises libav's errors, as `push` does."""
        self._graph = Graph()
        self._graph.threads = 1
        time_base = time_base or frame.time_base or ANY_TIME_BASE
        last = self._graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
        for name, arguments in filters:
            following = self._graph.add(name, arguments)
            last.link_to(following)
            last = following
        last.link_to(self._graph.add("buffersink"))
        self._graph.configure()

    def push(self, frame: Any | None) -> list[Any]:
        """Takes a frame, or None at the end; returns the frames that are ready. `frame` itself is not changed."""
        self._graph.vpush(frame)
        ready = []
        while True:
            try:
                ready.append(self._graph.vpull())
            except (NeedsInput, FilterEnded):
                return ready

    def apply(self, frame: Any) -> Any | None:
        """The filtered frame, or None if a filter drops it. For filters that give at most one frame for each."""
        return next(iter(self.push(frame)), None)

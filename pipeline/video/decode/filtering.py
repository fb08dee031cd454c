"""Chains of libav filters for single frames. Part of the decode package."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from av.error import BlockingIOError as NeedsInput
from av.error import EOFError as FilterEnded
from av.filter import Graph

ANY_TIME_BASE = Fraction(1, 1000)  # libav wants one; these filters do not look at times


class FilterChain:
    """Filters one after the other, for frames of the size and pixel format of `frame`. Gives at most one frame for one frame."""

    def __init__(self, frame: Any, filters: Iterable[tuple[str, str]]) -> None:
        """`filters` are libav's names and arguments. Raises libav's errors, as `apply` does."""
        self._graph = Graph()
        self._graph.threads = 1
        last = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or ANY_TIME_BASE
        )
        for name, arguments in filters:
            following = self._graph.add(name, arguments)
            last.link_to(following)
            last = following
        last.link_to(self._graph.add("buffersink"))
        self._graph.configure()

    def apply(self, frame: Any) -> Any | None:
        """The filtered frame, or None where a filter drops it. `frame` itself stays as it is."""
        self._graph.vpush(frame)
        try:
            return self._graph.vpull()
        except (NeedsInput, FilterEnded):
            return None

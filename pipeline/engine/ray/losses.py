"""Lost actors: `describe_loss` gives a line and a `Cause` for an exception; `LoadFailures` decides what follows a failed start.

Works on plain values and a clock that is passed in; Ray is imported for its exceptions only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError

from pipeline.errors import BuildError, FatalError, LatheError, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.driver.dispatch import Cause

LINE = 200  # characters of a reason
LOAD_FAILURES = 3  # failed starts of encoders in a row, while none is up, before the build stops
NODE_FAILURES = 2  # failed starts on a node before it gets no further encoder
LEFT_OUT_S = 1800.0  # how long it gets none; a lack of memory may pass
LONGEST_PAUSE_S = 60.0


def describe_loss(error: Exception) -> tuple[str, Cause]:
    """Why an actor was lost, in one line, and the cause. Ray's messages are pages of hints and statistics; this keeps their core."""
    text = " ".join(str(error).split())
    if isinstance(error, LatheError):
        return text[:LINE], "unexplained"
    if isinstance(error, RayActorError) and error.preempted:
        return "its node was preempted", "preempted"
    if isinstance(error, NodeDiedError) or "its node has died" in text:
        return "its node died", "node"
    if isinstance(error, OutOfMemoryError) or re.search(r"low on memory|memory monitor", text, re.I):
        return (
            "it was killed because its node ran low on memory; use fewer encoders or decoders a node",
            "unexplained",
        )
    if isinstance(error, ActorUnavailableError):
        return "Ray has no connection to it", "unexplained"
    if isinstance(error, RayActorError) and (detail := re.search(r"Worker exit detail: (.*?)(?:\.\s|$)", text)):
        return f"its process was killed or crashed ({detail[1][: LINE // 2]})", "unexplained"
    # A traceback of the worker ends with the exception.
    last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [""]
    name = "" if last[0].startswith(type(error).__name__) else f"{type(error).__name__}: "
    return f"{name}{last[0]}"[:LINE], "unexplained"


class LoadFailures:
    """Failed starts of encoders: when to create the next one, on which nodes not, when to stop the build. `now` is time.monotonic()."""

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s
        self._row = 0
        self._ever_up = False
        self._storage_since: float | None = None
        self._nodes: dict[str, list[float]] = {}  # node -> when encoders failed there
        self._excluded: set[str] = set()
        self._notices: list[str] = []
        self.create_at = 0.0

    def succeeded(self) -> None:
        """An encoder came up."""
        self._ever_up = True
        self._row = 0
        self._storage_since = None

    def failed(self, node: str | None, error: Exception, why: str, *, others: int, now: float) -> str:
        """An encoder did not come up; `others` are up or may still come up. Returns the end of the line that reports it.

        Raises:
            FatalError: `error`, if it is fatal, no encoder was ever up and there are no others: another try would fail the same way.
            BuildError: there are no others, and `LOAD_FAILURES` in a row failed, or storage failed for longer than `engine.outage_s`.
        """
        if isinstance(error, FatalError) and others == 0 and not self._ever_up:
            raise error
        if isinstance(error, StorageUnavailable):  # the weights cannot be fetched, on any node
            self._storage_since = now if self._storage_since is None else self._storage_since
            if others == 0 and now - self._storage_since > self._outage_s:
                raise BuildError(f"no encoder could start for {self._outage_s:g} s (engine.outage_s): {why}")
            pause = min(LONGEST_PAUSE_S, max(1.0, (now - self._storage_since) / 2))
        else:
            self._row += 1
            if node is not None:
                self._nodes.setdefault(node, []).append(now)
            if others == 0 and self._row >= LOAD_FAILURES:
                raise BuildError(f"no encoder is up, and {self._row} in a row did not come up; last: {why}")
            pause = min(LONGEST_PAUSE_S, 4.0 ** (self._row - 1))
        self.create_at = now + pause
        return f"; the next one is created in {pause:.0f} s"

    def excluded(self, nodes_alive: Callable[[], set[str]], now: float) -> list[str] | None:
        """Nodes that get no encoder at the moment; None if there are none, or if they are the only nodes."""
        excluded = {
            node for node, times in self._nodes.items() if sum(now - at < LEFT_OUT_S for at in times) >= NODE_FAILURES
        }
        if not excluded or not nodes_alive() - excluded:
            return None
        for node in sorted(excluded - self._excluded):
            self._notices.append(
                f"node {node[:12]} gets no encoder for {LEFT_OUT_S / 60:.0f} minutes: {len(self._nodes[node])} did not come up there"
            )
        self._excluded = excluded
        return sorted(excluded)

    def notices(self) -> list[str]:
        """Lines for the user since the last call."""
        notices, self._notices = self._notices, []
        return notices

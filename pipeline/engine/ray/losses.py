"""What Ray says of an actor that is lost, in one line, and what follows when encoders do not come up.

`describe_loss`: an exception of Ray or of a worker -> one line and a `Cause`. `LoadFailures`: when to create the next encoder, on which
nodes not, and when to stop the build. Plain values and a clock that is passed in; Ray is imported for its exceptions only.
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
LOAD_FAILURES = 3  # encoders in a row that do not come up, while none is up, before the build stops
NODE_FAILURES = 2  # encoders that do not come up on a node before it is left out
LEFT_OUT_S = 1800.0  # how long; a lack of memory may pass
LONGEST_PAUSE_S = 60.0


def describe_loss(error: Exception) -> tuple[str, Cause]:
    """Why an actor is gone, and who is to blame for it. Ray's own texts are pages of hints and statistics; their core is kept."""
    text = " ".join(str(error).split())
    if isinstance(error, LatheError):
        return text[:LINE], "unexplained"
    if isinstance(error, RayActorError) and error.preempted:
        return "its node was preempted", "preempted"
    if isinstance(error, NodeDiedError) or "its node has died" in text:
        return "its node died", "node"
    if isinstance(error, OutOfMemoryError) or re.search(r"low on memory|memory monitor", text, re.I):
        return (
            "it was killed because its node ran low on memory; fewer encoders or decoders a node need less",
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
    """Encoders that did not come up. `now` is time.monotonic()."""

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s
        self._row = 0
        self._ever_up = False
        self._storage_since: float | None = None
        self._nodes: dict[str, list[float]] = {}  # node -> when encoders failed there
        self._left_out: set[str] = set()
        self._notices: list[str] = []
        self.create_at = 0.0

    def succeeded(self) -> None:
        """An encoder came up."""
        self._ever_up = True
        self._row = 0
        self._storage_since = None

    def failed(self, node: str | None, error: Exception, why: str, *, others: int, now: float) -> str:
        """An encoder did not come up; `others` are up or may still come up. Returns what to add to the line that says so.

        Raises:
            FatalError: there are no others, none was ever up, and `error` is one: the job may be wrong, and another try changes nothing.
            BuildError: there are no others, and `LOAD_FAILURES` in a row failed, or storage did for longer than `engine.outage_s`.
        """
        if isinstance(error, FatalError) and others == 0 and not self._ever_up:
            raise error
        if isinstance(error, StorageUnavailable):  # the weights cannot be fetched: no node's fault
            self._storage_since = now if self._storage_since is None else self._storage_since
            if others == 0 and now - self._storage_since > self._outage_s:
                raise BuildError(f"no encoder comes up for {self._outage_s:g} s (engine.outage_s): {why}")
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
        """Nodes that get no encoder for now; None if there are none, or no other node is left."""
        sick = {
            node for node, times in self._nodes.items() if sum(now - at < LEFT_OUT_S for at in times) >= NODE_FAILURES
        }
        if not sick or not nodes_alive() - sick:
            return None
        for node in sorted(sick - self._left_out):
            self._notices.append(
                f"node {node[:12]} is left out for {LEFT_OUT_S / 60:.0f} minutes: {len(self._nodes[node])} encoders did not come up there"
            )
        self._left_out = sick
        return sorted(sick)

    def notices(self) -> list[str]:
        """Lines for the user since the last call."""
        notices, self._notices = self._notices, []
        return notices

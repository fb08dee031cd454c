"""Lost actors: why one was lost, as a line, a `Cause` and whether its own work ended it; what follows failed starts of encoders.

Works on plain values and a clock that is passed in; Ray is imported for its exceptions only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError

from pipeline.engine.worker.device_fault import device_fault
from pipeline.errors import BuildError, FatalError, LatheError, StorageUnavailable, WorkerLost

if TYPE_CHECKING:
    from pipeline.engine.driver.dispatch import Cause
    from pipeline.engine.worker.death_record import Death

LINE = 200  # characters of a reason
LOAD_FAILURES = 3  # failed starts of encoders in a row, while none is up, before the build stops
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Loss:
    """`blame`: the actor's own work ended it, so the videos of its step are suspects. `device`: by an error of its GPU.

    `sent`: by a signal from outside (`kill`, an operator), which says nothing about the node.
    """

    line: str
    cause: Cause
    blame: bool = False
    device: bool = False
    sent: bool = False


def judge_loss(error: Exception, death: Death | None) -> Loss:
    """Why an encoder was lost. `error`: what Ray or the driver reported; `death`: its record, None if that cannot be read."""
    line, cause = describe_loss(error)
    if cause in ("node", "preempted") or isinstance(error, StorageUnavailable | FatalError):
        return Loss(line, cause)
    where = _place(death)
    if isinstance(error, WorkerLost):  # it hung, or its decoders could not be placed
        return Loss(line + where, cause, blame=error.blame)
    if (fault := device_fault(error)) is not None:
        return Loss(f"its device failed: {fault}{where}", "unexplained", blame=True, device=True)
    if not isinstance(error, RayActorError):  # an exception of its loop, or of Ray's memory monitor
        return Loss(line + where, cause, blame=cause == "unexplained")
    if death is None or cause == "killed" or isinstance(error, ActorUnavailableError):
        return Loss(line + where, cause)
    if death.crash is not None:
        return Loss(f"its process crashed: {death.crash}{where}", "unexplained", blame=True)
    if death.oom_kills:
        memory = (
            f"the kernel's memory killer ended its process ({death.oom_file} counts {death.oom_kills} more than before)"
        )
        return Loss(f"{memory}{where}; give its node more memory, or use fewer encoders or decoders a node", "killed")
    if re.search(r"exit code [1-9]", line):
        return Loss(line + where, "unexplained", blame=True)
    return Loss(f"its process was killed from outside (no crash, no memory kill){where}", "killed", sent=True)


def _place(death: Death | None) -> str:
    if death is None or not death.stage:
        return ""
    videos = death.videos[:1]
    more = f" and {len(death.videos) - 1} more" if len(death.videos) > 1 else ""
    return f", in stage {death.stage!r}" + "".join(f" of {video.key} of {video.uri}{more}" for video in videos)


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
            "Ray's memory monitor killed it because its node ran low on memory; use fewer encoders or decoders a node",
            "killed",
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
    """Failed starts of encoders in a row: when to create the next one, when to stop the build. `now` is time.monotonic()."""

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s
        self._row = 0
        self._ever_up = False
        self._storage_since: float | None = None
        self.create_at = 0.0

    def succeeded(self) -> None:
        """An encoder came up."""
        self._ever_up = True
        self._row = 0
        self._storage_since = None

    def failed(self, error: Exception, why: str, *, others: int, hopeless: bool, now: float) -> str:
        """An encoder did not come up; `others` are up or may still come up; `hopeless`: it would fail the same way on every node.

        Returns the end of the line that reports it.

        Raises:
            FatalError: `error`, if it is fatal and hopeless, no encoder was ever up and there are no others.
            BuildError: there are no others, and it is hopeless, or `LOAD_FAILURES` in a row failed, or storage failed for longer than
                `engine.outage_s`.
        """
        if isinstance(error, FatalError) and hopeless and others == 0 and not self._ever_up:
            raise error
        if hopeless and others == 0:
            raise BuildError(f"no encoder can start on any node: {why}")
        if isinstance(error, StorageUnavailable):  # the weights cannot be fetched, on any node
            self._storage_since = now if self._storage_since is None else self._storage_since
            if others == 0 and now - self._storage_since > self._outage_s:
                raise BuildError(f"no encoder could start for {self._outage_s:g} s (engine.outage_s): {why}")
            pause = min(LONGEST_PAUSE_S, max(1.0, (now - self._storage_since) / 2))
        else:
            self._row += 1
            if others == 0 and self._row >= LOAD_FAILURES:
                raise BuildError(f"no encoder is up, and {self._row} in a row did not come up; last: {why}")
            pause = min(LONGEST_PAUSE_S, 4.0 ** (self._row - 1))
        self.create_at = now + pause
        return f"; the next one is created in {pause:.0f} s"

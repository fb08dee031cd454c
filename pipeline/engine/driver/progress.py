"""Progress of a build, for a display: `BuildProgress`s, notices, the final report. `pipeline.cli.progress` has the displays."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.engine.driver.report import BuildReport


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """A build at a moment. Frames and clips are live; samples and rejects are of finished shards."""

    shards_total: int
    shards_done: int  # with those of earlier runs
    bytes_total: int
    bytes_done: int
    clips: int
    frames: int
    frames_per_s: float
    samples: int
    rejects: int
    workers: int
    elapsed_s: float
    eta_s: float | None


class Display(Protocol):
    """Where progress goes."""

    def notice(self, text: str) -> None:
        """Something a person should know, once."""
        ...

    def update(self, snapshot: BuildProgress) -> None:
        """Called often; the display decides what to show."""
        ...

    def close(self, report: BuildReport | None) -> None:
        """The end; `report` is None if the build stopped with an error."""
        ...


class Silent:
    """Shows nothing: the library's default."""

    def notice(self, text: str) -> None:  # noqa: D102
        pass

    def update(self, snapshot: BuildProgress) -> None:  # noqa: D102
        pass

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        pass


class Repeats:
    """Shows what happened to shards: a reason that comes again is counted and told once in a while ("… and 11 more shards")."""

    def __init__(self, display: Display) -> None:
        self._display = display
        # kind of reason -> the shard shown, others with the last reason of each, since when
        self._more: dict[str, tuple[str, dict[str, str], float]] = {}

    def notice(self, shard: str, reason: str) -> None:
        """Shown at once if no reason of its kind is being counted."""
        # Reasons that differ in numbers, paths and ids only are of one kind.
        kind = re.sub(r"\S*[\d/]\S*", "…", reason)
        if kind in self._more:
            shown, others, _ = self._more[kind]
            if shard != shown:
                others.pop(shard, None)
                others[shard] = reason
        else:
            self._more[kind] = shard, {}, time.monotonic()
            self._display.notice(f"{shard}: {reason}")

    def flush(self, older_than_s: float = 0.0) -> None:
        """Tells what was counted for at least so long; the next one of its kind is shown again."""
        for kind, (_, others, since) in list(self._more.items()):
            if time.monotonic() - since >= older_than_s:
                del self._more[kind]
                if others:
                    more = f"{len(others)} more shards" if len(others) > 1 else "1 more shard"
                    self._display.notice(f"… and {more}: {others[next(reversed(others))]}")

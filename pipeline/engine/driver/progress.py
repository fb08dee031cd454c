"""Interface of a progress display, the numbers it shows, and notices that repeat. `pipeline.cli.progress` has the displays."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.engine.driver.report import BuildReport


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Numbers of a running build. Frames and clips are live; samples and rejects are of finished shards."""

    shards_total: int
    shards_done: int  # with those of earlier runs
    bytes_total: int  # of the sources this run has to encode
    bytes_done: int  # of those: in finished shards, and of finished samples in shards that run
    clips: int
    frames: int
    frames_per_s: float
    samples: int
    rejects: int
    workers: int
    elapsed_s: float
    eta_s: float | None  # None until bytes are done

    @property
    def percent(self) -> int:
        """Of the source bytes, rounded down."""
        return 100 * self.bytes_done // self.bytes_total if self.bytes_total else 100


class Display(Protocol):
    """Receives the progress of a build."""

    def notice(self, text: str) -> None:
        """Shows a line for the user."""
        ...

    def update(self, progress: BuildProgress) -> None:
        """Called often; the display decides what to show."""
        ...

    def close(self, report: BuildReport | None) -> None:
        """The end; `report` is None if the build stopped with an error."""
        ...


class Silent:
    """Display that shows nothing: the library's default."""

    def notice(self, text: str) -> None:  # noqa: D102
        pass

    def update(self, progress: BuildProgress) -> None:  # noqa: D102
        pass

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        pass


class Repeats:
    """Shows what happened to shards, and on `flush` how often a reason has repeated ("… and 11 more shards")."""

    def __init__(self, display: Display) -> None:
        self._display = display
        # kind of reason -> the shard shown, other shards with the last reason of each, when the count began
        self._more: dict[str, tuple[str, dict[str, str], float]] = {}

    def notice(self, shard: str, reason: str) -> None:
        """Shows the first reason of a kind at once, counts further ones. Reasons of a kind differ in numbers, paths and ids only."""
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
        """Shows what was counted for at least `older_than_s`; the next reason of that kind is shown at once again."""
        for kind, (_, others, since) in list(self._more.items()):
            if time.monotonic() - since >= older_than_s:
                del self._more[kind]
                if others:
                    more = f"{len(others)} more shards" if len(others) > 1 else "1 more shard"
                    self._display.notice(f"… and {more}: {others[next(reversed(others))]}")

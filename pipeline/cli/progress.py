"""Showing how far a build is: a live display on a terminal, plain lines elsewhere, JSON lines for machines.

Enters: `BuildProgress`s, notices, the final report. Leaves: text on stderr (rich, plain) or JSON lines on stdout. No rates are kept here
except what a display needs for its own pace.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.cli.wording import build_lines
from pipeline.engine.driver.progress import Display, Silent
from pipeline.units import duration

if TYPE_CHECKING:
    from pipeline.engine.driver.progress import BuildProgress
    from pipeline.engine.driver.report import BuildReport

PLAIN_EVERY_S = 10.0
JSON_EVERY_S = 1.0


def snapshot_line(snapshot: BuildProgress) -> str:
    """One plain line."""
    eta = f", about {duration(snapshot.eta_s)} left" if snapshot.eta_s is not None else ""
    return (
        f"{snapshot.shards_done}/{snapshot.shards_total} shards, {snapshot.clips} clips, {snapshot.frames_per_s:.1f} frames/s, "
        f"{snapshot.rejects} rejects, {snapshot.workers} encoders, {duration(snapshot.elapsed_s)}{eta}"
    )


def say(text: str, stream: TextIO | None = None) -> None:
    """Text on stderr or another stream. A terminal that was closed (SIGHUP) must not end a build that drains: its result is in the output.

    Raises:
        BrokenPipeError: the reader of stdout has gone.
    """
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            raise
        # What is buffered would fail again when Python ends, and change the exit code.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


class Plain:
    """A line every ten seconds, on stderr."""

    def __init__(self) -> None:
        self._next = 0.0

    def notice(self, text: str) -> None:  # noqa: D102
        say(f"lathe: {text}")

    def update(self, snapshot: BuildProgress) -> None:  # noqa: D102
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY_S
            self.notice(snapshot_line(snapshot))

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        if report is not None:
            say("\n".join(build_lines(report)), sys.stdout)


class Json:
    """One JSON object a line on stdout: `{"event": "notice" | "progress" | "report", …}`."""

    def __init__(self) -> None:
        self._next = 0.0

    def notice(self, text: str) -> None:  # noqa: D102
        self._emit("notice", {"text": text})

    def update(self, snapshot: BuildProgress) -> None:  # noqa: D102
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + JSON_EVERY_S
            self._emit("progress", asdict(snapshot))

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        if report is not None:
            self._emit("report", report.to_dict())

    def _emit(self, event: str, values: dict[str, Any]) -> None:
        say(json.dumps({"event": event, **values}), sys.stdout)


class Rich:
    """A live bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]shards[/] {task.fields[shards]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("build", total=1.0, shards="…", detail="starting")
        self._progress.start()

    def notice(self, text: str) -> None:  # noqa: D102
        with suppress(OSError):  # as in `say`
            self._console.print(text, markup=False, highlight=False)

    def update(self, snapshot: BuildProgress) -> None:  # noqa: D102
        eta = f" · {duration(snapshot.eta_s)} left" if snapshot.eta_s is not None else ""
        self._progress.update(
            self._task,
            total=max(1, snapshot.bytes_total),
            completed=snapshot.bytes_done,
            shards=f"{snapshot.shards_done}/{snapshot.shards_total}",
            detail=f"{snapshot.clips} clips · {snapshot.frames_per_s:.1f} frames/s · {snapshot.rejects} rejects{eta}",
        )

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        with suppress(OSError):  # as in `say`
            self._progress.stop()
        if report is not None:
            say("\n".join(build_lines(report)), sys.stdout)


def display_for(kind: str) -> Display:
    """The display of `--progress`; `auto` looks at whether stderr is a terminal."""
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "plain"
    displays: dict[str, type[Display]] = {"rich": Rich, "plain": Plain, "json": Json, "none": Silent}
    return displays[kind]()

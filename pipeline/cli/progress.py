"""Displays of a running build: a live bar on a terminal, plain lines elsewhere, JSON lines for programs.

Take `BuildProgress`, notices and the final report. Bar and lines go to stderr, JSON lines and the report to stdout.
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
from pipeline.units import duration, printable, quantity, size

if TYPE_CHECKING:
    from pipeline.engine.driver.progress import BuildProgress
    from pipeline.engine.driver.report import BuildReport

PLAIN_EVERY_S = 10.0
JSON_EVERY_S = 1.0


def progress_line(progress: BuildProgress) -> str:
    """One plain line."""
    eta = f", about {duration(progress.eta_s)} left" if progress.eta_s is not None else ""
    return (
        f"{progress.percent}% of {size(progress.bytes_total)}, {progress.shards_done}/{progress.shards_total} shards, "
        f"{quantity(progress.clips, 'clip')}, {progress.frames_per_s:.1f} frames/s, {quantity(progress.rejects, 'reject')}, "
        f"{quantity(progress.workers, 'encoder')}, {duration(progress.elapsed_s)}{eta}"
    )


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints on stderr or another stream. Where the terminal was closed (SIGHUP) nothing is shown: a draining build must continue.

    Raises:
        BrokenPipeError: the reader of stdout has gone.
    """
    stream = stream or sys.stderr
    text = "\n".join(map(printable, text.split("\n")))
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            raise
        # Python would write the buffer again when it ends, fail, and change the exit code.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


class Plain:
    """One line every ten seconds, on stderr."""

    def __init__(self) -> None:
        self._next = 0.0

    def notice(self, text: str) -> None:  # noqa: D102
        say(f"lathe: {text}")

    def update(self, progress: BuildProgress) -> None:  # noqa: D102
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY_S
            self.notice(progress_line(progress))

    def close(self, report: BuildReport | None) -> None:  # noqa: D102
        if report is not None:
            say("\n".join(build_lines(report)), sys.stdout)


class Json:
    """One JSON object per line on stdout: `{"event": "notice" | "progress" | "report", …}`."""

    def __init__(self) -> None:
        self._next = 0.0

    def notice(self, text: str) -> None:  # noqa: D102
        self._emit("notice", {"text": text})

    def update(self, progress: BuildProgress) -> None:  # noqa: D102
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + JSON_EVERY_S
            self._emit("progress", asdict(progress))

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
            self._console.print(printable(text), markup=False, highlight=False)

    def update(self, progress: BuildProgress) -> None:  # noqa: D102
        eta = f" · {duration(progress.eta_s)} left" if progress.eta_s is not None else ""
        self._progress.update(
            self._task,
            total=max(1, progress.bytes_total),
            completed=progress.bytes_done,
            shards=f"{progress.shards_done}/{progress.shards_total}",
            detail=f"{progress.clips} clips · {progress.frames_per_s:.1f} frames/s · {progress.rejects} rejects{eta}",
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

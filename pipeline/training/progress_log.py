"""Messages of a training run: lines on stderr and stdout, or JSON lines, as for `encode`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from pipeline.units import duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.training.run import PreparedRun

PLAIN_EVERY_S = 10.0


class ProgressLog:
    """Log of a run's progress. `kind`: the job's `progress`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._total = 0
        self._started: tuple[float, int] | None = None  # time and step of the first logged step
        self._next = 0.0

    def notice(self, text: str) -> None:
        """Prints a message to the user."""
        if self._kind == "json":
            self._emit("notice", {"text": text})
        elif self._kind != "none":
            print(f"lathe: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def begin(self, steps: int) -> None:
        """Sets the number of steps of the run."""
        self._total = steps

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values of a step: all of them as JSON; as text every ten seconds, and the first and last."""
        now = time.monotonic()
        started, first = self._started = self._started or (now, step)
        left_s = (now - started) / (step - first) * (self._total - step) if step > first else None
        if self._kind == "json":
            self._emit("progress", {"step": step, "steps": self._total, "eta_s": left_s, **values})
        elif self._kind != "none" and (now >= self._next or step == self._total):
            self._next = now + PLAIN_EVERY_S
            self.notice(step_line(step, self._total, values, left_s))

    def end(self, prepared: PreparedRun, weights: Path) -> None:
        """Reports the finished run."""
        counts = prepared.unusable.counts() if prepared.unusable is not None else {}
        if self._kind == "json":
            self._emit("report", {"weights": str(weights), "network": prepared.recipe.network, "unusable": counts})
            return
        if counts and prepared.unusable is not None:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.items())
            print(f"unusable videos: {reasons}; see {prepared.unusable.path}")  # noqa: T201
        print(f"weights: {weights}")  # noqa: T201
        command = f"lathe encode --model {prepared.recipe.network} --checkpoint {weights} INPUT... OUTPUT"
        print(f"use them: {command}", flush=True)  # noqa: T201

    def _emit(self, event: str, values: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **values}), flush=True)  # noqa: T201


def step_line(step: int, steps: int, values: Mapping[str, float], left_s: float | None) -> str:
    """One plain line of a logged step."""
    metrics = "".join(f", {name} {values[name]:.4g}" for name in ("loss", "psnr") if name in values)
    eta = f", about {duration(left_s)} left" if left_s else ""
    return f"step {step}/{steps}{metrics}{eta}"

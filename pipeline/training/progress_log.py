"""How a training run reads: what it begins with, how far it is, what came of it.

Enters: notices, values of steps, the end. Leaves: lines on stderr and stdout, or JSON lines for machines, as for `encode`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from pipeline.units import duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.training.run import Prepared

PLAIN_EVERY_S = 10.0


class ProgressLog:
    """What a run says while it runs. `kind`: of `TrainJob.progress`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._total = 0
        self._begun: tuple[float, int] | None = None  # when, and at which step
        self._next = 0.0

    def notice(self, text: str) -> None:
        """Something a person should know, once."""
        if self._kind == "json":
            self._emit("notice", {"text": text})
        elif self._kind != "none":
            print(f"lathe: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def begin(self, steps: int) -> None:
        """A run of so many steps starts or goes on."""
        self._total = steps

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a logged step: as JSON all of them, as text every ten seconds, the first and the last."""
        now = time.monotonic()
        begun, first = self._begun = self._begun or (now, step)
        left_s = (now - begun) / (step - first) * (self._total - step) if step > first else None
        if self._kind == "json":
            self._emit("progress", {"step": step, "steps": self._total, "eta_s": left_s, **values})
        elif self._kind != "none" and (now >= self._next or step == self._total):
            self._next = now + PLAIN_EVERY_S
            self.notice(step_line(step, self._total, values, left_s))

    def end(self, prepared: Prepared, weights: Path) -> None:
        """The weights are there."""
        tally = prepared.unusable.tally() if prepared.unusable is not None else {}
        if self._kind == "json":
            self._emit("report", {"weights": str(weights), "network": prepared.recipe.network, "unusable": tally})
            return
        if tally and prepared.unusable is not None:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in tally.items())
            print(f"videos of no use: {reasons}; see {prepared.unusable.path}")  # noqa: T201
        print(f"weights: {weights}")  # noqa: T201
        command = f"lathe encode --model {prepared.recipe.network} --checkpoint {weights} INPUT... OUTPUT"
        print(f"use them: {command}", flush=True)  # noqa: T201

    def _emit(self, event: str, values: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **values}), flush=True)  # noqa: T201


def step_line(step: int, steps: int, values: Mapping[str, float], left_s: float | None) -> str:
    """One plain line of a logged step."""
    told = "".join(f", {name} {values[name]:.4g}" for name in ("loss", "psnr") if name in values)
    eta = f", about {duration(left_s)} left" if left_s else ""
    return f"step {step}/{steps}{told}{eta}"

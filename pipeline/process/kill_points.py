"""Deliberate failures at named points of the code, set by the job's `drill` section: they test that a kill loses and doubles nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import TransientError

if TYPE_CHECKING:
    from pipeline.config import DrillConfig


def fire(drill: DrillConfig, point: str) -> None:
    """Fails as `drill` says, if `point` is its point and it has failed fewer than `times` times (marker files count, over all processes).

    Raises:
        TransientError: `drill.action` is "raise".
        RuntimeError: `drill.action` is "device_error".
    """
    if drill.point != point or drill.marker_dir is None:
        return
    folder = Path(drill.marker_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(drill.times):
        try:
            (folder / f"{point}-{n}").touch(exist_ok=False)
        except FileExistsError:
            continue
        _act(drill.action, point)
        return


def _act(action: str, point: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "crash":
        signal.raise_signal(signal.SIGSEGV)  # in this thread, as a fault of its code: `os.kill` may hit another, later
    if action == "hang":
        while True:
            time.sleep(3600)
    if action == "device_error":
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered (deliberate, at {point})")
    raise TransientError(f"deliberate failure at {point} (drill.point)")

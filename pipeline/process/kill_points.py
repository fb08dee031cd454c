"""Fire drills: a named point in the code may be told to die, hang or fail, so that "kill anything" is rehearsed, not believed.

Enters: the job's `drill` section and the name of the point just reached. Leaves: nothing, if the process survives.
"""

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
    """Does what the drill says if this is its point and it has not fired `times` times yet (marker files count, across processes)."""
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
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "hang":
        while True:
            time.sleep(3600)
    raise TransientError(f"fire drill at {point}")

"""File in which an encoder process records why it may end: its stage, the videos of its step, memory kills, its crash.

`DeathRecord` is made in the process. Once the process is gone, `take_death` on the same machine reads the file; it needs no answer of the
process, so it works after SIGKILL too. Ray reports a crash, a kill and a lack of memory alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engine.decoders.crash_report import CrashReport, take_report
from pipeline.engine.decoders.exit_status import crash_named
from pipeline.engine.worker.blamed_video import StepVideo

if TYPE_CHECKING:
    from collections.abc import Iterable

STEP_BYTES = 64 * 1024
MOST_VIDEOS = 64  # of one step that are recorded
LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Death:
    """What an ended process left. `oom_kills`: kills by the kernel's memory killer in its cgroup (or machine) since it last looked."""

    crash: str | None = None  # the signal of its crash; None: it did not crash
    stage: str = ""
    videos: tuple[StepVideo, ...] = ()
    oom_kills: int = 0
    oom_file: str = ""  # where these were counted


class DeathRecord:
    """Makes the files and records crashes from now on. `path` names them for `take_death`."""

    def __init__(self) -> None:
        self._crash = CrashReport()
        self.path = self._crash.path
        descriptor = os.open(_step_path(self.path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until the process ends: see `crash_report._sweep`
        # Written, not only reserved: on a full disk a write into a hole is a SIGBUS.
        os.write(descriptor, bytes(STEP_BYTES))
        self._map = mmap.mmap(descriptor, STEP_BYTES)
        self._guard = threading.Lock()
        self._oom_file = oom_file()
        self._oom_kills = 0
        self._stage: tuple[str, list[tuple[str, str, str]]] = ("", [])
        self.refresh()

    def stage(self, name: str, videos: Iterable[StepVideo] = ()) -> None:
        """The process is now in this stage; `videos` are those of the encode step."""
        found = list(dict.fromkeys((video.shard_id, video.uri, video.key) for video in videos))
        with self._guard:
            self._stage = name, found[:MOST_VIDEOS]
            self._write()

    def refresh(self) -> None:
        """Counts memory kills up to now, which did not end this process (but decoders, for example). Called every few seconds."""
        kills = count_oom_kills(self._oom_file)
        with self._guard:
            self._oom_kills = kills
            self._write()

    def close(self) -> None:
        """Deletes the files: the process ends because it was told to."""
        take_death(self.path)

    def _write(self) -> None:
        name, videos = self._stage
        text = json.dumps([name, videos, self._oom_file, self._oom_kills]).encode()
        if len(text) > STEP_BYTES - LENGTH_BYTES:  # keys and URIs of many thousand characters
            text = json.dumps([name, [], self._oom_file, self._oom_kills]).encode()
        self._map[:LENGTH_BYTES] = bytes(LENGTH_BYTES)  # no length: a write that a kill cut in two is not read
        self._map[LENGTH_BYTES : LENGTH_BYTES + len(text)] = text
        self._map[:LENGTH_BYTES] = len(text).to_bytes(LENGTH_BYTES, "big")


def take_death(path: str) -> Death | None:
    """What the process whose record is at `path` left; None if the record is gone. Deletes its files."""
    step = Path(_step_path(path))
    crash = crash_named(take_report(path))
    try:
        raw = step.read_bytes()
        step.unlink()
    except OSError:  # deleted with its machine's temporary files, or taken before
        return None
    length = int.from_bytes(raw[:LENGTH_BYTES], "big")
    if not length:
        return Death(crash)
    stage, videos, counted_in, kills = json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + length])
    since = count_oom_kills(counted_in) - kills
    return Death(crash, stage, tuple(StepVideo(*video) for video in videos), max(0, since), counted_in)


def oom_file(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> str:
    """File that counts kills by the kernel's memory killer: of this process's cgroup (version 2 or 1), else of the machine; "" if none."""
    candidates = []
    with contextlib.suppress(OSError):
        for line in Path(proc, "self", "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                candidates += [f"{cgroups}{path}/memory.events", f"{cgroups}/memory.events"]
            elif "memory" in controllers.split(","):
                candidates += [f"{cgroups}/memory{path}/memory.oom_control", f"{cgroups}/memory/memory.oom_control"]
    candidates.append(f"{proc}/vmstat")
    return next((path.replace("//", "/") for path in candidates if _kills_in(path) is not None), "")


def count_oom_kills(path: str) -> int:
    """The number in a file that `oom_file` found; 0 if it cannot be read."""
    return _kills_in(path) or 0


def _kills_in(path: str) -> int | None:
    try:
        text = Path(path).read_text() if path else ""
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("oom_kill ")]
    return int(found[0]) if found else None


def _step_path(path: str) -> str:
    return f"{path}-step"

"""`lathe` commands with a temporary folder and an environment of their own, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.engine.decoders.crash_report import PREFIX as CRASH_REPORT
from tests import forked_command

if TYPE_CHECKING:
    from tests.chaos.corpus import UploadedCorpus

GONE_LIMIT_S = 240.0  # for processes that were killed to be gone
MARK = "LATHE_CHAOS"  # in the environment of every process that a command starts


class Commands:
    """Temporary folder and environment of `lathe` commands. They must leave no process, file or shared memory at the end of the block."""

    def __init__(self, corpus: UploadedCorpus, endpoint: str) -> None:
        self._mark = uuid.uuid4().hex
        self.limit_s = GONE_LIMIT_S
        self._shared = set(os.listdir("/dev/shm"))
        self.temporary = Path(tempfile.mkdtemp(prefix="lc", dir="/tmp"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **corpus.server.environment(),
            "AWS_ENDPOINT_URL": endpoint,
            "TMPDIR": str(self.temporary),
            MARK: self._mark,
        }

    def start(self, *arguments: str, endpoint: str | None = None) -> forked_command.ForkedCommand:
        """A running `lathe` command. What it prints goes to a file, which `printed` reads. `endpoint`: instead of the usual one."""
        environment = self.environment if endpoint is None else {**self.environment, "AWS_ENDPOINT_URL": endpoint}
        with (self.temporary.parent / f"{self.temporary.name}.log").open("ab") as log:
            return forked_command.start(*arguments, env=environment, stdout=log.fileno(), stderr=log.fileno())

    def printed(self) -> str:
        """What the commands have printed so far."""
        return (self.temporary.parent / f"{self.temporary.name}.log").read_text()

    def processes(self) -> list[psutil.Process]:
        """Live processes that these commands started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # of another user, or gone
                continue
        return found

    def left(self) -> dict[str, list[str]]:
        """What is there now and should not be."""
        found = {
            "processes": [" ".join(process.cmdline())[:100] for process in self.processes()],
            # Of Ray: its workers report a crash in a file that their driver takes; of a node that died, the next encoder there deletes it.
            # pymp-: sockets of Python's multiprocessing in Ray's own processes, which are killed with their cluster.
            "temporary": sorted(
                path.name for path in self.temporary.iterdir() if not path.name.startswith((CRASH_REPORT, "pymp-"))
            ),
            "shared memory": sorted(set(os.listdir("/dev/shm")) - self._shared),
        }
        return {name: values for name, values in found.items() if values}

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the folder.

        Raises:
            AssertionError: a process, temporary file or shared memory is left, unless the block has failed anyway.
        """
        deadline = time.monotonic() + (self.limit_s if kind is None else 0.0)
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.temporary.parent / f"{self.temporary.name}.log").unlink(missing_ok=True)
        assert left == {} or kind is not None, left

"""Lifecycle of an output under a schedule: encode, publish, takedown, compact, gc, each started again until it was not killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from pipeline.format.layout import CURRENT, LEASES
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from tests.chaos import checks, schedule
from tests.chaos.corpus import encode_arguments
from tests.chaos.faulting_proxy import FaultingProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.commands import Commands
    from tests.chaos.corpus import UploadedCorpus
    from tests.chaos.schedule import Step, Victim
    from tests.forked_command import ForkedCommand

COMMAND_LIMIT_S = 900.0
ATTEMPTS = 3  # `engine.attempts`


@dataclass
class Figures:
    """What happened. `kills`, `faults`: by kind. `attempts`: at shards, over all builds. `seconds`: of all commands together."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    requests: int = 0
    seconds: float = 0.0

    def add(self, other: Figures) -> None:
        """Sums both."""
        for name in ("kills", "faults", "commands"):
            getattr(self, name).update(getattr(other, name))
        self.attempts += other.attempts
        self.requests += other.requests
        self.seconds += other.seconds

    def __str__(self) -> str:
        kinds = (f"{name} {dict(sorted(getattr(self, name).items()))}" for name in ("commands", "kills", "faults"))
        return f"{', '.join(kinds)}, attempts {self.attempts}, requests {self.requests}, {self.seconds:.0f} s"


class Lifecycle:
    """One output from its first build to its last gc. `kill` ends a victim other than the driver or a decoder of its own."""

    def __init__(
        self,
        corpus: UploadedCorpus,
        seed: int,
        *,
        flags: tuple[str, ...] = ("--executor", "inline"),
        kill: Callable[[Victim, Commands], bool] | None = None,
        before_build: Callable[[], None] = lambda: None,
    ) -> None:
        self._corpus, self._seed, self._flags, self._kill_other = corpus, seed, flags, kill
        self._before_build = before_build
        self.output = corpus.output()
        self.figures = Figures()
        self._store = corpus.store(self.output)

    def run(self, steps: list[Step], proxy: FaultingProxy, commands: Commands) -> Figures:
        """All steps, with checks after each command that was not killed.

        Raises:
            AssertionError: something was lost, doubled, left behind or ended in an error.
        """
        began = time.monotonic()
        for number, step in enumerate(steps):
            before = len(proxy.attempts)
            self._step(number, step, proxy, commands)
            self._check(step)
            if step.command == "encode" and self.figures.commands["gc"]:
                assert len(proxy.attempts) == before, "a build encoded again what was published"
        self._check_attempts(proxy)
        self.figures.faults += proxy.broken
        self.figures.attempts = sum("-compacted-" not in name for name in proxy.attempts)
        self.figures.requests = len(proxy.requests)
        self.figures.seconds = time.monotonic() - began
        return self.figures

    def _step(self, number: int, step: Step, proxy: FaultingProxy, commands: Commands) -> None:
        if step.command == "encode":
            self._before_build()
        runs: list[ForkedCommand] = []
        killed: list[Victim] = []

        def kill(victim: Victim) -> bool:
            while not runs:  # `start` has not returned yet
                time.sleep(0.001)
            if found := self._kill(victim, runs[0], commands):
                killed.append(victim)
            return found

        actions = {at: (lambda victim=victim: kill(victim)) for victim, at in step.victims}
        proxy.begin(lambda request: schedule.fault(self._seed, number, request), actions)
        runs.append(commands.start(*self._arguments(step)))
        code = runs[0].wait(COMMAND_LIMIT_S)
        proxy.end()
        self.figures.commands[step.command] += 1
        killed = [victim for victim in killed if victim != "driver" or code == -signal.SIGKILL]
        self.figures.kills.update(killed)
        wanted = -signal.SIGKILL if "driver" in killed else 0
        assert code == wanted, (
            f"seed {self._seed}, step {number} {step}: exit code {code}\n{commands.printed()[-4000:]}"
        )
        if "driver" in killed:
            self._forget_dead()

    def _kill(self, victim: Victim, run: ForkedCommand, commands: Commands) -> bool:
        """Whether there was one to kill."""
        if victim == "driver":
            with contextlib.suppress(ProcessLookupError):  # its last request, by a thread that it does not wait for
                os.kill(run.pid, signal.SIGKILL)
                return True
            return False
        if victim == "decoder":
            with contextlib.suppress(psutil.NoSuchProcess):  # the command or the decoder has just ended
                for process in psutil.Process(run.pid).children():
                    if _leads_its_group(process):
                        process.kill()
                        return True
            return False
        assert self._kill_other is not None, victim
        return self._kill_other(victim, commands)

    def _forget_dead(self) -> None:
        """As if two minutes had passed: until then a dead process counts as running, for leases and for `lathe gc`."""
        for prefix in (LEASES, CURRENT.progress):
            for key in list(self._store.keys(prefix)):
                self._store.delete(key)

    def _arguments(self, step: Step) -> list[str]:
        if step.command == "encode":
            return encode_arguments(self._corpus, self.output, *self._flags)
        if step.command == "publish":
            return ["publish", self.output, self._corpus.inputs, "--canary", "0"]
        if step.command == "takedown":
            return ["takedown", self.output, self._corpus.taken, "--reason", "asked to"]
        if step.command == "compact":
            return ["compact", self.output]
        return ["gc", self.output, "--grace", "0m", "--keep-snapshots", "1", "--keep-days", "0", "--forget"]

    def _check(self, step: Step) -> None:
        """After every command, killed or not: the newest snapshot is whole. After one that was not killed: so is all that readers see."""
        if step.command == "encode":
            return
        if Snapshots(self._store).latest() is None:
            assert step.command == "publish"
            assert step.victims
            return
        hidden = bool(read_takedowns(self._store).records)
        assert hidden or step.command in ("publish", "takedown")
        expected = self._corpus.kept if hidden else self._corpus.clean
        checks.assert_published(self._store, expected)
        if not step.victims:
            checks.assert_readers_see(self._corpus, self.output, expected)
        if step.command == "gc" and not step.victims:
            assert checks.stored_files(self._store) == checks.named_files(self._store)

    def _check_attempts(self, proxy: FaultingProxy) -> None:
        starts = self.figures.commands["encode"]
        tries = Counter(name[:16] for name in proxy.attempts if "-compacted-" not in name)
        assert max(tries.values()) <= ATTEMPTS * starts, (tries, starts)


def _leads_its_group(process: psutil.Process) -> bool:
    """Whether it is a decoder: the process that forks decoders is in the group of the command."""
    try:
        return os.getpgid(process.pid) == process.pid
    except ProcessLookupError:
        return False

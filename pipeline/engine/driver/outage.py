"""Distinguishes a store that is away from a single object that fails, and pauses the build while the store is away.

Takes attempts that ended with StorageUnavailable, and successes. Gives, for each failed attempt, whether it counts against its shard, and
whether the build is paused. Every failure starts a probe of the stores concerned, in a thread of its own. If a store does not answer, the
build is paused until it does, and nothing counts. If stores answer while `MANY` shards in a row fail, the build is `doubtful`: failures are
held back, and only a few shards that have not failed yet are tried, with growing pauses. When one succeeds, or none is left, the store
works, and the failures held back count. In all other cases the failure counts against its shard.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import BuildError, LatheError, StorageUnavailable
from pipeline.storage import locate
from pipeline.units import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.storage import Store

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between probes
PROBE_S = 10.0  # a store that does not answer a probe for so long is away (a network file system may block for ever)
MANY = 3  # different shards that fail in a row may be an outage, even if the store answers probes
FORGET_S = 600.0  # failures further apart are not counted as one series


@dataclass(frozen=True, slots=True)
class Ruling:
    """Decision about the failure of one parked shard."""

    shard_id: str
    error: StorageUnavailable
    counts: bool


@dataclass(slots=True)
class _Probe:
    """One probe of all stores concerned. `down` is set before `done`."""

    asked_at: float
    asking: str = ""  # the root that is probed now
    done: bool = False
    down: tuple[str, LatheError] | None = None  # the root that does not answer


class OutageWatch:
    """Used by one thread. `now` is time.monotonic()."""

    def __init__(self, output: Store, open_root: Callable[[str], Store], outage_s: float) -> None:
        self._output = output
        self._open_root = open_root
        self._outage_s = outage_s
        self._parked: dict[str, tuple[StorageUnavailable, float]] = {}  # shard -> error, start of the attempt
        self._held: dict[str, StorageUnavailable] = {}  # while doubtful: shard -> error, not counted yet
        self._row: dict[str, float] = {}  # shards that failed since the last success, and when
        self._probe: _Probe | None = None
        self._probe_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._since: float | None = None  # first failure of the present outage
        self._since_clock = ""
        self._back_at = float("-inf")  # the end of the last outage
        self._doubt_shown_at = float("-inf")
        self._last = ""  # message of the last failure, one line
        self.paused = False
        self.doubtful = False  # the store answers probes, and perhaps no other request

    def failed(self, shard_id: str, error: StorageUnavailable, started: float, now: float) -> None:
        """An attempt ended. A ruling about it follows from `poll`."""
        if self._row and not self.paused and not self.doubtful and now - max(self._row.values()) > FORGET_S:
            self.succeeded()
        if not self._row and self._since is None:
            self._since_clock = time.strftime("%H:%M:%S")
        self._row[shard_id] = now
        self._parked[shard_id] = error, started
        self._last = error.message

    def succeeded(self) -> None:
        """A shard was committed. Only a probe ends an outage in which the store does not answer."""
        if self.doubtful:
            self.paused = False
        if not self.paused:
            self._row.clear()
            self._since = None
            self.doubtful = False

    def poll(self, now: float, *, fresh: Callable[[], bool]) -> tuple[list[Ruling], list[str]]:
        """Rulings, and lines for the user. `fresh`: whether a shard waits or runs whose storage has not failed.

        Raises:
            BuildError: the outage lasts longer than `engine.outage_s`.
        """
        rulings: list[Ruling] = []
        notices: list[str] = []
        if self._probe is not None and self._probe.done:
            probe, self._probe = self._probe, None
            if probe.down is not None:
                notices += self._is_down(*probe.down, now)
            elif self.paused and not self.doubtful:
                rulings, notices = self._is_back(now)
            elif self.doubtful or (len(self._row) >= MANY and fresh()):
                notices += self._is_doubtful(now)
            else:
                rulings = [Ruling(shard, error, begun >= self._back_at) for shard, (error, begun) in self._take()]
        elif self._probe is not None and now - self._probe.asked_at > PROBE_S and (self.doubtful or not self.paused):
            hung = StorageUnavailable(f"a probe of {self._probe.asking} has not been answered for {PROBE_S:g} s")
            notices += self._is_down(self._probe.asking, hung, now)
        if self.doubtful and not fresh() and not self._parked:
            self.succeeded()
        if not self.doubtful:
            rulings += [Ruling(shard, error, True) for shard, error in self._held.items()]
            self._held.clear()
        if self._since is not None and self.paused and now - self._since > self._outage_s:
            raise BuildError(
                f"storage has failed since {self._since_clock}, longer than engine.outage_s={self._outage_s:g}: {self._last}; "
                "repair it, and the same command resumes"
            )
        if self._probe is None and (now >= self._probe_at if self.paused else self._parked):
            self._ask(now)
        return rulings, notices

    # --- results of probes -----------------------------------------------------------------------------------------

    def _is_down(self, root: str, error: LatheError, now: float) -> list[str]:
        new = self._since is None or self.doubtful
        if self.doubtful:  # it was away from the first failure on
            self.doubtful = False
            self._parked |= {shard: (held, self._since or now) for shard, held in self._held.items()}
            self._held.clear()
        self._pause(now)
        self._last = error.message
        if not new:
            return []
        return [
            f"{root} has not answered since {self._since_clock} ({error.message}); waiting, nothing is given up; it is probed again "
            f"every {FIRST_PAUSE_S:g} to {LONGEST_PAUSE_S:g} s, and after {duration(self._outage_s)} the build ends"
        ]

    def _is_doubtful(self, now: float) -> list[str]:
        """The store answers a probe. The first time the build continues at once; after each further failure it pauses first."""
        failed = self._take()
        self._held |= {shard: error for shard, (error, _) in failed}
        if self.doubtful:
            if failed and not self.paused:
                self._pause(now)
            else:
                self.paused = False  # the pause is over
            return []
        self._begin(now)
        self.doubtful = True
        if now - self._doubt_shown_at < FORGET_S:
            return []
        self._doubt_shown_at = now
        return [
            f"{len(self._row)} shards in a row failed since {self._since_clock}, last: {self._last}; a few shards at a time that have not "
            f"failed are tried, with pauses of {FIRST_PAUSE_S:g} to {LONGEST_PAUSE_S:g} s; if all fail, the build ends after "
            f"{duration(self._outage_s)}"
        ]

    def _begin(self, now: float) -> None:
        if self._since is None:
            self._since = min(self._row.values(), default=now)
            self._pause_s = FIRST_PAUSE_S

    def _pause(self, now: float) -> None:
        """Pauses until the next probe."""
        self._begin(now)
        self.paused = True
        self._probe_at = now + self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)

    def _is_back(self, now: float) -> tuple[list[Ruling], list[str]]:
        lasted = now - self._since if self._since is not None else 0.0
        self.paused = False
        self._back_at = now
        self.succeeded()
        rulings = [Ruling(shard, error, False) for shard, (error, _) in self._take()]
        return rulings, [f"storage answers again after {duration(lasted)}; the build continues"]

    def _take(self) -> list[tuple[str, tuple[StorageUnavailable, float]]]:
        parked, self._parked = self._parked, {}
        return list(parked.items())

    # --- the probe thread ---------------------------------------------------------------------------------------------

    def _ask(self, now: float) -> None:
        roots = {locate(error.uri)[0] for error, _ in self._parked.values() if error.uri}
        self._probe = _Probe(now)
        # A daemon: a store that hangs must not keep the process.
        threading.Thread(target=self._run_probe, args=(self._probe, roots), name="probe", daemon=True).start()

    def _run_probe(self, probe: _Probe, roots: set[str]) -> None:
        try:
            for store in (self._output, *map(self._open_root, sorted(roots))):
                probe.asking = store.root
                try:
                    store.probe()
                except StorageUnavailable as error:
                    probe.down = store.root, error
                    return
                except LatheError as error:
                    if store is self._output:  # the build listed it when it began, so it is away
                        probe.down = store.root, error
                        return
                    # The root of an input may never have been listable: a refusal is an answer.
        finally:
            probe.done = True

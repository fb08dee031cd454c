"""Failed starts of decoder processes: the pause before the next start, or the end of the build.

A process that ends by itself before it is up shows a fault of this machine (no interpreter, no library, no memory): `FAILED_STARTS` of
these in a row stop the build while no decoder is up. One that is killed from outside shows a shortage that may pass: it is started again
after growing pauses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import BuildError

if TYPE_CHECKING:
    from pipeline.errors import WorkerLost

FAILED_STARTS = 6  # processes in a row that end by themselves on start-up while none is up, before the build stops
NO_DECODER_S = 300.0  # without a decoder that is up, because all are killed from outside, before the build stops
PAUSES_S = 0.25, 30.0  # before the next start of a lane: first and longest; doubled each time


class StartUps:
    """Failed starts of one encoder's lanes."""

    def __init__(self, lanes: int) -> None:
        self._in_a_row = [0] * lanes  # by lane
        self._by_themselves = 0  # of all lanes, since one came up
        self._none_up_since: float | None = None  # first failed start since one came up

    def up(self, lane: int) -> None:
        """The lane's process is up."""
        self._in_a_row[lane] = self._by_themselves = 0
        self._none_up_since = None

    def died(self, lane: int, error: WorkerLost, *, others_up: bool, now: float) -> float:
        """The lane's process died before it was up, at `now` on a clock in seconds. Returns the pause before its next start.

        Raises:
            BuildError: no decoder is up, and too many starts failed or for too long.
        """
        if not others_up:
            self._none_up_since = now if self._none_up_since is None else self._none_up_since
            self._by_themselves += error.blame
            if self._by_themselves >= FAILED_STARTS:
                raise BuildError(
                    f"{FAILED_STARTS} decoder processes in a row died before they were up; the last: {error.message}"
                )
            if now - self._none_up_since > NO_DECODER_S:
                raise BuildError(f"no decoder process came up in {NO_DECODER_S:.0f} s; the last: {error.message}")
        first, longest = PAUSES_S
        pause = min(longest, first * 2 ** min(self._in_a_row[lane], 10))
        self._in_a_row[lane] += 1
        return pause

"""Relay in front of an S3 server that breaks requests by a schedule and calls a function at some of them."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.chaos.schedule import FAULTS
from tests.faulty_proxy import Fault, FaultyProxy

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA_FILE = re.compile(r"/data/[0-9a-f]{8}/[^/]+/([0-9a-f]{16}-[A-Za-z0-9_-]+)-\d{5,}\.")


class FaultingProxy(FaultyProxy):
    """Relay to `target`. `begin` starts counting requests anew, `end` stops breaking them.

    `attempts`: shards with their attempts, `{shard16}-{attempt}`, whose data files were written, with how often. `broken`: faults by name.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(target, self._decide)
        self.broken: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.count = 0  # requests since `begin`
        self.error: BaseException | None = None  # of an action
        self._fault_of: Callable[[int], str | None] | None = None
        self._actions: dict[int, Callable[[], bool]] = {}
        self._turn = threading.RLock()

    def begin(
        self,
        fault_of: Callable[[int], str | None] | None = None,
        actions: Mapping[int, Callable[[], bool]] | None = None,
    ) -> None:
        """From the next request on, which is number 1: `fault_of` names its fault, `actions` are called before it is served. All
        requests wait for an action. One that returns False, because there is nothing to act on yet, is called again at the next request.
        """
        with self._turn:
            self.count, self._fault_of, self._actions = 0, fault_of, dict(actions or {})

    def end(self) -> None:
        """From now on all requests are served. Raises what an action has raised."""
        self.begin()
        if self.error is not None:
            raise self.error

    def _decide(self, method: str, target: str, before: int) -> Fault | None:
        with self._turn:
            self.count += 1
            if method == "PUT" and (found := DATA_FILE.search(unquote(target))):
                self.attempts[found[1]] += 1
            action = self._actions.pop(self.count, None)
            if action is not None:
                try:
                    if not action():
                        self._actions[self.count + 1] = action
                except BaseException as error:
                    self.error = error
                    raise
            name = None if self._fault_of is None else self._fault_of(self.count)
            if name is None:
                return None
            self.broken[name] += 1
            return FAULTS[name]

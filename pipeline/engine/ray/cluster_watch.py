"""Thread that asks Ray's head for the nodes that live and those that go away, so that the driver's loop never waits for the head.

The pool reads the latest answers, and for how long there was none.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import ray
from ray._private.state import state as ray_state

if TYPE_CHECKING:
    from collections.abc import Callable

PERIOD_S = 5.0
LINE = 200  # characters of a failure

Answer = tuple[set[str], dict[str, float]]


class ClusterWatch:
    """`alive`: ids of live nodes that have room for an encoder when nothing else runs.

    `draining`: node -> unix time in seconds at which it goes away; inf where that is not known.
    `failure`: what Ray said instead of the latest answer, in one line; "" if it answered, or says nothing.
    """

    def __init__(self, ask: Callable[[], Answer], period_s: float = PERIOD_S) -> None:
        self.alive: set[str] = set()
        self.draining: dict[str, float] = {}
        self.failure = ""
        self._answers = self._seen = 0
        self._seen_at = 0.0
        self._ask = ask
        self._period_s = period_s
        self._closing = threading.Event()
        # A daemon: a question may stay without an answer for ever.
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    def silent_s(self, now: float) -> float:
        """Seconds without an answer at `now`, on the caller's clock, which began at 0 with this object."""
        if self._answers != self._seen:
            self._seen, self._seen_at = self._answers, now
        return now - self._seen_at

    def close(self) -> None:
        """Ends the thread after the question that is under way. Does not wait."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self.alive, self.draining = self._ask()
            except Exception as error:  # noqa: BLE001 - Ray raises bare exceptions; the pool reads how long they last
                self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LINE]
            else:
                self.failure = ""
                self._answers += 1
            self._closing.wait(self._period_s)


def ask_head(home: str, cpus: float, gpus: int) -> Answer:
    """Live nodes with so many CPUs and GPUs, and draining nodes. `home`: the driver's node.

    Raises ConnectionError where the head does not know the driver's node: it was started anew, and knows no actor either.
    `get_draining_nodes` is not a public interface of Ray: without it no node seems to be drained.
    """
    nodes = [(node["NodeID"], node.get("Resources", {})) for node in ray.nodes() if node.get("Alive")]
    if home not in dict(nodes):
        raise ConnectionError(f"the head knows {len(nodes)} live nodes, and not the driver's, {home}")
    alive = {node for node, has in nodes if has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus}
    ask = getattr(ray_state, "get_draining_nodes", None)
    draining = ask() if ask is not None else {}
    return alive, {
        node: deadline_ms / 1000 if deadline_ms > 0 else float("inf") for node, deadline_ms in draining.items()
    }

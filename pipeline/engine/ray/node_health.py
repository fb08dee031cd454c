"""Nodes on which encoders fail: which get no encoder for a time, and why. Works on plain values and a clock that is passed in.

Takes failed starts, lost encoders and errors of a device, each with its node. A node is avoided after `FAILURES` of any kind, at once where
another try would fail the same way (another checkpoint than the build's, a GPU that fails a second time). It gets encoders again after
`AVOIDED_S`, and at any time if every node is avoided: then it is not the node. Failures in steps of a video that is rejected because it
ended encoders on several nodes are forgotten: many such videos must not close a healthy cluster.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.engine.worker.blamed_video import BlamedVideo, StepVideo

FAILURES = 3  # within `AVOIDED_S`
GPU_FAILURES = 2  # errors of one GPU; a process of its own failed each time
AVOIDED_S = 1800.0


@dataclass(frozen=True, slots=True)
class _Failure:
    at: float
    why: str
    gpu: str | None
    certain: bool
    videos: frozenset[tuple[str, str]]  # (URI, key) of its step


class NodeHealth:
    """`now` is time.monotonic()."""

    def __init__(self) -> None:
        self._failures: dict[str, list[_Failure]] = defaultdict(list)
        self._names: dict[str, str] = {}
        self._avoided: set[str] = set()
        self._new: list[tuple[str, str]] = []

    def failed(
        self,
        node: str,
        why: str,
        now: float,
        *,
        host: str = "",
        gpu: str | None = None,
        certain: bool = False,
        step: Iterable[StepVideo] = (),
    ) -> None:
        """An encoder failed on the node, in `step`. `gpu`: the one that failed; `certain`: another try there would fail the same way."""
        recent = [failure for failure in self._failures[node] if now - failure.at < AVOIDED_S]
        videos = frozenset((video.uri, video.key) for video in step)
        self._failures[node] = [*recent, _Failure(now, why, gpu, certain, videos)]
        self._names[node] = f"{host} ({node[:12]})" if host else node[:12]

    def avoided(self, alive: Callable[[], set[str]], now: float) -> list[str] | None:
        """Nodes that get no encoder at the moment, sorted; None if there are none, or if no other node is alive."""
        reasons = {node: why for node in self._failures if (why := self._why_avoided(node, now))}
        if not reasons or not alive() - set(reasons):
            self._avoided.clear()
            return None
        for node in sorted(set(reasons) - self._avoided):
            text = f"node {self._names[node]} gets no encoder for {AVOIDED_S / 60:.0f} minutes: {reasons[node]}"
            self._new.append((node, text))
        self._avoided = set(reasons)
        return sorted(reasons)

    def all_certain(self, alive: Callable[[], set[str]], now: float) -> bool:
        """Whether on every node another try would fail the same way."""
        sure = {node for node in self._failures if any(failure.certain for failure in self._recent(node, now))}
        return bool(sure) and bool(nodes := alive()) and not nodes - sure

    def excuse(self, blamed: Iterable[BlamedVideo]) -> None:
        """Forgets failures in steps of those of these videos that are rejected and failed on several nodes."""
        for video in blamed:
            name = video.uri, video.key
            where = [node for node, found in self._failures.items() if any(name in each.videos for each in found)]
            if video.drop and len(where) > 1:
                for node in where:
                    self._failures[node] = [each for each in self._failures[node] if name not in each.videos]

    def forget(self) -> None:
        """All nodes get encoders again."""
        self._failures.clear()
        self._avoided.clear()

    def newly_avoided(self) -> list[tuple[str, str]]:
        """(node, line for the user) of nodes avoided since the last call."""
        new, self._new = self._new, []
        return new

    def _recent(self, node: str, now: float) -> list[_Failure]:
        return [failure for failure in self._failures[node] if now - failure.at < AVOIDED_S]

    def _why_avoided(self, node: str, now: float) -> str | None:
        recent = self._recent(node, now)
        if (sure := next((failure.why for failure in recent if failure.certain), None)) is not None:
            return sure
        gpus = Counter(failure.gpu for failure in recent if failure.gpu is not None)
        if (worst := gpus.most_common(1)) and worst[0][1] >= GPU_FAILURES:
            return f"GPU {worst[0][0]} failed {worst[0][1]} times, last: {recent[-1].why}"
        return f"{len(recent)} encoders failed there, last: {recent[-1].why}" if len(recent) >= FAILURES else None

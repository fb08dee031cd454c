"""Which videos end workers: counts deaths in encode steps by video, and rejects a video before its shard is given up. No clock, no I/O.

Only deaths by a worker's own work are reported here (a crash, an error of the device, a hang); a kill from outside blames no video. Every
video of the step is a suspect, and is encoded in steps of its own from then on. A video is dropped after `TRIES` deaths, at least one of
them in a step that it had for itself. Deaths on a node that is avoided meanwhile are forgotten: the node ends any worker.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.engine.worker.blamed_video import BlamedVideo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.engine.worker.blamed_video import StepVideo

TRIES = 2  # workers that a video may end
MOST_DROPPED = 8  # videos of a shard; beyond, its failures count as those of any shard


@dataclass(frozen=True, slots=True)
class _Death:
    node: str
    alone: bool
    why: str


class BlamedVideos:
    """See the module."""

    def __init__(self) -> None:
        self._deaths: dict[str, dict[tuple[str, str], list[_Death]]] = defaultdict(
            lambda: defaultdict(list)
        )  # by shard

    def died(self, step: Sequence[StepVideo], node: str, why: str) -> None:
        """A worker on `node` ended in a step with these videos."""
        for video in step:
            self._deaths[video.shard_id][video.uri, video.key].append(_Death(node, len(step) == 1, why))

    def forgive(self, node: str) -> None:
        """The node gets no more encoders: what ended there says nothing about the videos."""
        for videos in self._deaths.values():
            for name in list(videos):
                videos[name] = [death for death in videos[name] if death.node != node]
                if not videos[name]:
                    del videos[name]

    def of(self, shard_id: str) -> tuple[BlamedVideo, ...]:
        """Blamed videos of a shard, for its next attempt."""
        found = []
        for (uri, key), deaths in self._deaths.get(shard_id, {}).items():
            drop = len(deaths) >= TRIES and any(death.alone for death in deaths)
            found.append(BlamedVideo(uri, key, len(deaths), drop, deaths[-1].why))
        return tuple(found)

    def dropped_by(self, step: Sequence[StepVideo], shard_id: str) -> str | None:
        """Key of a video of the shard that is dropped because of the last death, in `step`; None where the death counts for the shard."""
        dropped = [video for video in self.of(shard_id) if video.drop]
        if len(dropped) > MOST_DROPPED:
            return None
        inside = {(video.uri, video.key) for video in step if video.shard_id == shard_id}
        return next((video.key for video in dropped if (video.uri, video.key) in inside), None)

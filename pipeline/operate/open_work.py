"""What is known not to be done when a snapshot is made: listed inputs, receipts that were cut off, shards of running builds."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import PublishFailed
from pipeline.format.columns import storable
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import uri_id
from pipeline.operate.status import MISSED, heartbeats
from pipeline.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store

NAMED = 3  # of open shards, in messages
NOT_AN_INPUT = re.compile(r"receipt of shard \S+ \(cut off\)|\d+ shards? of the running build .*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RunningBuild:
    """A build whose heartbeat is recent. `shards`: not done yet. `seconds`: for which it counts as running if it was killed."""

    name: str
    shards: int
    seconds: float

    def __str__(self) -> str:
        return f"{quantity(self.shards, 'shard')} of the running build {self.name}"


@dataclass(frozen=True, slots=True)
class OpenWork:
    """Entries of `Snapshot.open_shards`, by kind."""

    sources: list[str] = field(default_factory=list)  # listed inputs without a receipt
    cut_off: list[str] = field(default_factory=list)
    builds: list[RunningBuild] = field(default_factory=list)
    # Inputs that the parent recorded and that are not known to be done.
    handed_on: list[str] = field(default_factory=list)

    def entries(self) -> tuple[str, ...]:
        """All, as recorded."""
        return tuple(map(storable, (*self.sources, *self.handed_on, *self.cut_off, *map(str, self.builds))))

    def refuse(self, candidate: Candidate) -> None:
        """Stops a publisher that must not leave anything open. What an earlier snapshot left open is only handed on.

        Raises:
            PublishFailed: there is open work.
        """
        decisions = candidate.decisions
        if not (self.sources or self.cut_off or self.builds):
            return
        number = len(self.sources) + len(self.cut_off) + sum(build.shards for build in self.builds)
        under = ""
        if self.sources and len(decisions.fingerprints) > 1:
            under = f" under fingerprint {str(decisions.current)[:8]}, that of the newest receipt"
        named = [*map(str, self.builds), *self.cut_off, *self.sources][:NAMED]
        unlisted = "" if candidate.listing is not None else ", publish with the inputs to wait only for these"
        raise PublishFailed(
            f"{quantity(number, 'shard or input is', 'shards or inputs are')} not done{under}: {', '.join(named)}; finish with "
            f"`lathe encode`{unlisted}, or publish what is done with --partial{self._if_killed()}"
        )

    def _if_killed(self) -> str:
        """How long a heartbeat of a killed build still counts."""
        parts = [f"{build.name} in {duration(build.seconds)}" for build in self.builds[:NAMED]]
        return f". A build that was killed stops counting without a heartbeat: {', '.join(parts)}" if parts else ""


def running_builds(store: Store, fingerprint: str) -> dict[str, RunningBuild]:
    """Builds with open shards that encode into fingerprints with this prefix, by name."""
    found = {}
    for build in heartbeats(store, Ledger(store).layout.progress):
        name, wanted = str(build.get("build")), str(build.get("fingerprint", "")).startswith(fingerprint)
        left = int(build.get("shards_total") or 0) - int(build.get("shards_done") or 0)
        if build.get("running", True) and wanted and left > 0:
            ends = float(build["last_seen"]) + MISSED * float(build["every_s"])
            found[name] = RunningBuild(name, left, max(0.0, ends - time.time()))
    return found


def open_work(
    candidate: Candidate, builds: dict[str, RunningBuild], replaced: Collection[str], recorded: Sequence[str]
) -> OpenWork:
    """Open work of a candidate.

    A listing says which inputs are not done, whatever shard they were in: then neither receipts that were cut off nor running builds
    are open in themselves. Such a build may have been killed when it was done, or encode other inputs.

    Args:
        candidate: the contents of the next snapshot.
        builds: those that ran before its receipts were listed, and those that run now.
        replaced: shards whose receipts are cut off, but whose inputs were encoded again in other groups.
        recorded: open work of the parent.
    """
    if candidate.listing is not None:
        return OpenWork(sources=[source.uri for source in candidate.decisions.selection.open_sources])
    return OpenWork(
        cut_off=[f"receipt of shard {shard} (cut off)" for shard in candidate.cut_off if shard not in replaced],
        builds=list(builds.values()),
        handed_on=_handed_on(candidate, recorded),
    )


def _handed_on(candidate: Candidate, recorded: Sequence[str]) -> list[str]:
    """Inputs that the parent recorded as open and that no newer receipt names."""
    before = [name for name in recorded if not NOT_AN_INPUT.fullmatch(name)]
    if not before:
        return []
    done = candidate.decisions.named_since()
    return [uri for uri in before if uri_id(uri) not in done]

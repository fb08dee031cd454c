"""What is known not to be done when a snapshot is made: listed inputs, receipts that were cut off, shards of running builds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import uri_id
from pipeline.operate.status import heartbeats

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store

NAMED = 3  # of open shards, in messages
NOT_AN_INPUT = re.compile(r"receipt of shard \S+ \(cut off\)|\d+ shards of the running build .*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class OpenWork:
    """Entries of `Snapshot.open_shards`, by kind."""

    sources: list[str] = field(default_factory=list)  # listed inputs without a receipt
    cut_off: list[str] = field(default_factory=list)
    builds: list[str] = field(default_factory=list)
    handed_on: list[str] = field(
        default_factory=list
    )  # inputs that the parent recorded and that are not known to be done
    shards_of_builds: int = 0

    def entries(self) -> tuple[str, ...]:
        """All, as recorded."""
        return (*self.sources, *self.handed_on, *self.cut_off, *self.builds)

    def refuse(self, candidate: Candidate) -> None:
        """Stops a publisher that must not leave anything open. What an earlier snapshot left open is only handed on.

        Raises:
            PublishFailed: there is open work.
        """
        decisions = candidate.decisions
        if not (self.sources or self.cut_off or self.builds):
            return
        number = len(self.sources) + len(self.cut_off) + self.shards_of_builds
        under = ""
        if self.sources and len(decisions.fingerprints) > 1:
            under = f" under fingerprint {str(decisions.current)[:8]}, that of the newest receipt"
        named = [*self.builds, *self.cut_off, *self.sources][:NAMED]
        known = ", publish with the inputs to see if any is not done" if self.cut_off else ""
        raise PublishFailed(
            f"{number} shards or inputs are not done{under}: {', '.join(named)}; finish them "
            f"with `lathe encode`{known}, or publish what is done with --partial"
        )


def running_builds(store: Store, fingerprint: str) -> dict[str, tuple[int, str]]:
    """Builds that encode into fingerprints with this prefix: by name of the build its open shards, as a number and in words."""
    found = {}
    for build in heartbeats(store, Ledger(store).layout.progress):
        wanted = str(build.get("fingerprint", "")).startswith(fingerprint)
        left = int(build.get("shards_total") or 0) - int(build.get("shards_done") or 0)
        if build.get("running", True) and wanted and left > 0:
            found[str(build.get("build"))] = (left, f"{left} shards of the running build {build.get('build')}")
    return found


def open_work(candidate: Candidate, builds: dict[str, tuple[int, str]], replaced: Collection[str]) -> OpenWork:
    """Open work of a candidate.

    With a listing, receipts that were cut off are not open in themselves: their inputs may have been encoded again in other groups.

    Args:
        candidate: the contents of the next snapshot.
        builds: those that ran before its receipts were listed, and those that run now.
        replaced: shards whose receipts are cut off, but whose inputs were encoded again in other groups.
    """
    cut_off = [shard for shard in candidate.cut_off if shard not in replaced]
    if candidate.listing is not None:  # the listing says which inputs are not done, whatever shard they were in
        cut_off = []
    return OpenWork(
        sources=[source.uri for source in candidate.decisions.selection.open_sources],
        cut_off=[f"receipt of shard {shard} (cut off)" for shard in cut_off],
        builds=[words for _, words in builds.values()],
        handed_on=_handed_on(candidate),
        shards_of_builds=sum(left for left, _ in builds.values()),
    )


def _handed_on(candidate: Candidate) -> list[str]:
    """Without a listing: inputs that the parent recorded as open and that no newer receipt names."""
    if candidate.parent is None or candidate.listing is not None:
        return []
    before = [name for name in candidate.parent.open_shards if not NOT_AN_INPUT.fullmatch(name)]
    if not before:
        return []
    done = candidate.decisions.named_since()
    return [uri for uri in before if uri_id(uri) not in done]

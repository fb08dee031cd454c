"""Work of a run: sources of its inputs that no counted receipt covers, and notices about those that one covers.

Takes listed shards, summaries of the output's receipts, the fingerprint and the job. Gives `Work`. Coverage is decided source by source,
and only the sources left are grouped: it does not matter how earlier runs grouped plain files.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.corpus import group_files
from pipeline.ledger.overlaps import Overlaps
from pipeline.ledger.summary import DAMAGED, source_id, uri_id
from pipeline.ledger.takedowns import NONE
from pipeline.records import Counts, Shard, SourceObject
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import EncodeJob, StorageConfig
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.ledger.takedowns import Takedowns


@dataclass(slots=True)
class Work:
    """Sources left to encode, the receipts that cover the other inputs, and lines for the user."""

    overlaps: Overlaps
    tars: list[Shard] = field(default_factory=list)
    files: list[SourceObject] = field(default_factory=list)
    retries: list[Shard] = field(default_factory=list)
    # Finished inputs, by shard id of the receipt that counts for them.
    finished: dict[str, list[SourceObject]] = field(default_factory=lambda: defaultdict(list))
    # Sources left to encode of which an older version with the same URI is finished: the bytes may be the same.
    touched: dict[SourceObject, list[ReceiptSummary]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    # By another fingerprint: receipts with inputs of this run, if it encodes any.
    others: dict[str, list[ReceiptSummary]] = field(default_factory=dict)
    taken_down: int = 0  # sources that are not encoded because a takedown names them

    def todo(self, config: StorageConfig) -> list[Shard]:
        """Shards to hand out. Plain files are grouped here, independent of the groups they were listed in."""
        return [*self.tars, *group_files(self.files, config), *self.retries]

    def finished_receipts(self) -> list[ReceiptSummary]:
        """Receipts that count for a finished input, and the retries that complete them."""
        by_shard, retries = self.overlaps.by_shard, self.overlaps.retries
        return [item for shard in self.finished for item in (by_shard[shard], *retries.get(shard, ()))]

    def reasons(self) -> Counter[str]:
        """Rejects of the finished inputs, by reason."""
        found: Counter[str] = Counter()
        for text, receipts in Counter(item.reasons for item in self.finished_receipts()).items():
            found.update({reason: n * receipts for reason, n in json.loads(text).items()})
        return found

    def before(self) -> Counts:
        """Samples and damaged samples of the finished inputs, and clips of all receipts that count for one of them."""
        samples = clips = damaged = regions = 0
        for shard, sources in self.finished.items():
            base = self.overlaps.by_shard[shard]
            receipts = [base, *self.overlaps.retries.get(shard, ())]
            clips += sum(item.clips for item in receipts)
            if base.marks:
                samples += len(sources)
                damaged += _damaged(sources, receipts)
            else:
                samples += base.samples
                damaged += sum(item.damaged for item in receipts)
                regions += sum(item.damaged_regions for item in receipts)
        return Counts(samples=samples, clips=clips, damaged=damaged, damaged_regions=regions)


def _damaged(sources: list[SourceObject], receipts: list[ReceiptSummary]) -> int:
    """Number of these plain files that are damaged, each by the last receipt that covers it."""
    marks: dict[bytes, int] = {}
    for item in receipts:
        marks.update(zip(item.uri_ids(), item.marks, strict=True))
    return sum(bool(marks[uri_id(source.uri)] & DAMAGED) for source in sources)


def find_work(
    shards: Iterable[Shard],
    summaries: list[ReceiptSummary],
    fingerprint: str,
    job: EncodeJob,
    takedowns: Takedowns = NONE,
) -> Work:
    """Compares listed sources with the receipts of this fingerprint; reads nothing. Sources that are taken down are left out."""
    ours = [item for item in summaries if item.fingerprint == fingerprint]
    work = Work(Overlaps(ours))
    owners = _owners(ours, work.overlaps)
    listed: set[bytes] = set()
    for shard in shards:
        for source in shard.objects:
            if takedowns.takes_any_of(source):
                work.taken_down += 1
                continue
            identity = source_id(source)
            listed.add(identity)
            if identity in owners:
                work.finished[owners[identity]].append(source)
                continue
            if shard.kind == "tar":
                work.tars.append(shard)
            else:
                work.files.append(source)
    work.touched = _older_versions(ours, [*(shard.objects[0] for shard in work.tars), *work.files])
    work.notices += _format_notice(work, job.write.format)
    work.others = _under_other_settings(work, summaries, fingerprint, listed)
    return work


def _owners(ours: list[ReceiptSummary], overlaps: Overlaps) -> dict[bytes, str]:
    """By source: the shard whose receipt counts for it."""
    owners: dict[bytes, str] = {}
    for item in ours:
        if item.retry is None and item.same_as is None:
            for source in item.source_ids():
                owners[source] = overlaps.owner(item.fingerprint, source).shard_id
    sources: dict[str, dict[bytes, bytes]] = {}
    for item in ours:
        targets = json.loads(item.same_as) if item.same_as is not None else ()
        for source, uri, target in zip(item.source_ids(), item.uri_ids(), targets, strict=False):
            older = overlaps.by_shard.get(target)
            if older is None or source in owners:  # a deleted receipt covers nothing
                continue
            if target not in sources:
                sources[target] = older.source_of_uri()
            if (same := sources[target].get(uri)) is not None:
                owners[source] = overlaps.owner(item.fingerprint, same).shard_id
    return owners


def _older_versions(
    ours: list[ReceiptSummary], pending: list[SourceObject]
) -> dict[SourceObject, list[ReceiptSummary]]:
    """Pending sources of which a receipt has another version with the same URI, with those receipts."""
    wanted = {uri_id(source.uri) for source in pending} if ours else set()
    found: dict[bytes, list[ReceiptSummary]] = defaultdict(list)
    for item in ours:
        if item.retry is None and item.same_as is None:
            for uri in wanted.intersection(item.uri_ids()):
                found[uri].append(item)
    return {source: found[uri] for source in pending if found and (uri := uri_id(source.uri)) in found}


def without_unchanged(work: Work, unchanged: dict[SourceObject, ReceiptSummary]) -> Work:
    """`work` with these touched sources as finished, by the receipt of an older version with the same bytes."""
    sources: dict[str, dict[bytes, bytes]] = {}
    for source, older in unchanged.items():
        if older.shard_id not in sources:
            sources[older.shard_id] = older.source_of_uri()
        owner = work.overlaps.owner(older.fingerprint, sources[older.shard_id][uri_id(source.uri)])
        work.finished[owner.shard_id].append(source)
    work.tars = [shard for shard in work.tars if shard.objects[0] not in unchanged]
    work.files = [source for source in work.files if source not in unchanged]
    work.notices.append(
        f"{quantity(len(unchanged), 'input has', 'inputs have')} a new modification time or etag and the same bytes as before: not encoded "
        "again, the rows are kept"
    )
    return work


def _format_notice(work: Work, container: str) -> list[str]:
    containers = (work.overlaps.by_shard[shard].container for shard in work.finished)
    others = Counter(found for found in containers if found not in ("", container))
    return [
        f"{n} finished shards are stored as {name} and stay so; write.format={container} applies to shards encoded from now on"
        for name, n in sorted(others.items())
    ]


def _under_other_settings(
    work: Work, summaries: list[ReceiptSummary], fingerprint: str, listed: set[bytes]
) -> dict[str, list[ReceiptSummary]]:
    others: dict[str, list[ReceiptSummary]] = defaultdict(list)
    for item in summaries if work.tars or work.files else ():
        if item.fingerprint != fingerprint and not listed.isdisjoint(item.source_ids()):
            others[item.fingerprint].append(item)
    return others

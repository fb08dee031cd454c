"""What a run has to do: sources of its inputs that no counted receipt covers, and what it should say about those that one does.

In: listed shards, summaries of the output's receipts, the fingerprint, the job. Out: `Work`. How plain files were grouped by earlier
runs does not matter: what is covered is decided source by source, and only what is left is grouped again.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.corpus import group_files
from pipeline.overlaps import counted, hidden_parts
from pipeline.receipts import Ledger
from pipeline.records import Counts, Retry, Shard
from pipeline.summaries import source_id, uri_id

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import EncodeJob, StorageConfig
    from pipeline.overlaps import Hidden
    from pipeline.records import Receipt, Reject, SourceObject
    from pipeline.storage import Store
    from pipeline.summaries import ReceiptSummary

# Reasons that depend on an option outside the fingerprint. A larger value of the option lets more inputs through.
LIMIT_OF_REASON = {
    "too_many_pixels": "decode.max_pixels",
    "too_many_frames": "decode.max_frames",
    "too_long": "decode.max_duration_s",
    "too_large": "decode.max_video_bytes",
    "decode_timeout": "decode.timeout_s",
    "decoder_memory": "decode.memory_bytes",
    "non_finite_latent": "write.max_abs",
}
REASONS_SHOWN = 4


@dataclass(slots=True)
class Work:
    """What is left to do, the receipts that cover the rest of the inputs, and lines for the user."""

    tars: list[Shard] = field(default_factory=list)
    files: list[SourceObject] = field(default_factory=list)
    retries: list[Shard] = field(default_factory=list)
    finished: list[ReceiptSummary] = field(default_factory=list)
    # Samples and damaged samples of the inputs that are finished, and clips of all receipts that cover one of them.
    before: Counts = field(default_factory=Counts)
    # Sources to do of which older versions with the same URI are finished: their bytes may be the same.
    touched: dict[SourceObject, list[ReceiptSummary]] = field(default_factory=dict)
    listed: dict[str, SourceObject] = field(default_factory=dict)  # by URI, what is finished
    notices: list[str] = field(default_factory=list)

    @property
    def shards_finished(self) -> int:
        """Finished shards; a retry belongs to the shard that it completes."""
        return sum(1 for item in self.finished if item.retry is None and item.same_as is None)

    def todo(self, config: StorageConfig) -> list[Shard]:
        """The shards to hand out; plain files are grouped here, whatever groups they were listed in."""
        return [*self.tars, *group_files(self.files, config), *self.retries]


def without_unchanged(work: Work, unchanged: dict[SourceObject, ReceiptSummary]) -> Work:
    """`work` where these touched sources count as finished: by the receipt of an older version with the same bytes."""
    finished = {item.shard_id: item for item in work.finished}
    for source, older in unchanged.items():
        work.before += _file_counts(older, uri_id(source.uri))
        if older.shard_id not in finished:
            finished[older.shard_id] = older
            work.before += _counts(older)
        work.listed[source.uri] = source
    work.finished = list(finished.values())
    work.tars = [shard for shard in work.tars if shard.objects[0] not in unchanged]
    work.files = [source for source in work.files if source not in unchanged]
    work.notices.append(
        f"{len(unchanged)} inputs have a new modification time or etag and the same bytes as before: their rows stand, "
        "nothing of them is encoded again"
    )
    return work


def find_work(shards: Iterable[Shard], summaries: list[ReceiptSummary], fingerprint: str, job: EncodeJob) -> Work:
    """Compares listed sources with the receipts of this fingerprint; reads nothing."""
    ours = [item for item in summaries if item.fingerprint == fingerprint]
    hidden = hidden_parts(ours)
    covering: dict[bytes, tuple[ReceiptSummary, int]] = {}  # by source, with its position in the receipt
    by_uri: dict[bytes, list[ReceiptSummary]] = defaultdict(list)
    by_shard = {item.shard_id: item for item in ours}
    for item in sorted((item for item in ours if item.retry is None), key=lambda item: item.precedence):
        for position, (covered, name) in enumerate(zip(item.source_ids(), item.uri_ids(), strict=True)):
            covering.setdefault(covered, (item, position))
            if item.same_as is None:
                by_uri[name].append(item)
    work, retries = Work(), _retries_of(ours)
    finished: dict[str, ReceiptSummary] = {}
    listed: set[bytes] = set()
    samples = damaged = 0
    for shard in shards:
        for source in shard.objects:
            identity, uri = source_id(source), uri_id(source.uri)
            listed.add(identity)
            if identity not in covering:
                if uri in by_uri:
                    work.touched[source] = by_uri[uri]
                if shard.kind == "tar":
                    work.tars.append(shard)
                else:
                    work.files.append(source)
                continue
            found, position = covering[identity]
            parts = [found, *retries.get(identity, ())]
            if found.same_as is not None and (older := by_shard.get(json.loads(found.same_as)[position])) is not None:
                parts.append(older)
                work.before += _file_counts(older, uri)
            elif found.damaged_files:
                samples, damaged = samples + 1, damaged + found.damaged_files[position]
            finished.update((part.shard_id, part) for part in parts)
            work.listed[source.uri] = source
    work.finished = list(finished.values())
    work.before += Counts(samples=samples, damaged=damaged)
    work.before += sum((_counts(item) for item in work.finished if not _superseded(item, hidden)), Counts())
    work.notices += _format_notice(work.finished, job.write.format)
    work.notices += _other_settings_notice(work, summaries, fingerprint, listed)
    return work


def _retries_of(summaries: list[ReceiptSummary]) -> dict[bytes, list[ReceiptSummary]]:
    found: dict[bytes, list[ReceiptSummary]] = defaultdict(list)
    for item in summaries:
        for source in item.source_ids() if item.retry is not None else ():
            found[source].append(item)
    return found


def _counts(item: ReceiptSummary) -> Counts:
    """Of a group of plain files only its clips: it may hold files that are not inputs of this run."""
    if item.damaged_files:
        return Counts(clips=item.clips)
    return Counts(samples=item.samples, clips=item.clips, damaged=item.damaged)


def _file_counts(item: ReceiptSummary, uri: bytes) -> Counts:
    """Of one file of a group; nothing for a tar, which is counted whole."""
    if not item.damaged_files:
        return Counts()
    return Counts(samples=1, damaged=item.damaged_files[item.uri_ids().index(uri)])


def _superseded(item: ReceiptSummary, hidden: dict[str, Hidden]) -> bool:
    return item.shard_id in hidden and set(item.source_ids()) <= hidden[item.shard_id].sources


def _format_notice(finished: list[ReceiptSummary], container: str) -> list[str]:
    others = Counter(item.container for item in finished if item.container not in ("", container))
    return [
        f"{n} finished shards are stored as {name} and stay so; write.format={container} holds for what is encoded from now on"
        for name, n in sorted(others.items())
    ]


def _other_settings_notice(
    work: Work, summaries: list[ReceiptSummary], fingerprint: str, listed: set[bytes]
) -> list[str]:
    others = Counter(
        item.fingerprint
        for item in summaries
        if (work.tars or work.files) and item.fingerprint != fingerprint and not listed.isdisjoint(item.source_ids())
    )
    return [
        f"{n} shards of these inputs were encoded before with other settings (fingerprint {other[:8]}, this run {fingerprint[:8]}); "
        "they are encoded again beside those, see `lathe inspect` for both"
        for other, n in sorted(others.items())
    ]


def retry_work(store: Store, work: Work, job: EncodeJob) -> None:
    """Adds shards for the rejects that `job.retry_rejects` names; without it, says how many inputs it would encode again.

    Reads the receipts that may hold such rejects and no others.
    """
    limits, wanted = job.limits(), job.retry_rejects
    suspects = [item for item in work.finished if _may_retry(item, limits, wanted)]
    if not suspects:
        if wanted is not None:
            work.notices.append("--retry-rejects: no finished shard has such a reject")
        return
    uris = {uri for item in suspects for uri in item.uri_ids()}
    related = [item for item in work.finished if not uris.isdisjoint(item.uri_ids())]
    hidden = hidden_parts(work.finished)
    read = Ledger(store).read_all([[item.key] for item in related])
    parts = [counted(receipt, hidden) for receipt in read if receipt is not None]
    found: Counter[str] = Counter()
    for base in (part for part in parts if part.receipt.shard.retry is None and not part.receipt.same_as):
        sources = {source.uri for source in base.receipt.shard.objects if source.uri not in base.hidden_uris}
        retries = [
            part.receipt
            for part in parts
            if part.receipt.shard.retry is not None
            and not sources.isdisjoint(source.uri for source in part.receipt.shard.objects)
        ]
        open_ = _open_rejects(base.receipt, retries, sources)
        again = [(reject, holder) for reject, holder in open_ if _retried(reject.reason, holder, limits, wanted)]
        samples = {(str(reject.uri), str(reject.key)) for reject, _ in again}
        found.update(reason for _, _, reason in {(reject.uri, reject.key, reject.reason) for reject, _ in again})
        if samples and wanted is not None:
            replaced = [reject for reject, _ in open_ if (reject.uri, reject.key) in samples]
            work.retries += _retry_shards(base.receipt, retries, replaced, work, job)
    _tell(work, found, job, wanted)


def _may_retry(item: ReceiptSummary, limits: dict[str, float], wanted: tuple[str, ...] | None) -> bool:
    reasons = json.loads(item.reasons)
    if wanted:
        return any(reason in reasons for reason in wanted)
    then = json.loads(item.limits)
    return any(_laxer(reason, then, limits) for reason in reasons)


def _retried(reason: str, holder: Receipt, limits: dict[str, float], wanted: tuple[str, ...] | None) -> bool:
    return reason in wanted if wanted else _laxer(reason, holder.limits, limits)


def _laxer(reason: str, then: dict[str, float], now: dict[str, float]) -> bool:
    option = LIMIT_OF_REASON.get(reason)
    return option is not None and option in then and now[option] > then[option]


def _open_rejects(base: Receipt, retries: list[Receipt], sources: set[str]) -> list[tuple[Reject, Receipt]]:
    """Rejects that still stand, each with the receipt that holds it: a retry replaces those of the samples that it encoded again."""
    found = [(reject, base) for reject in base.rejects if reject.key is not None and reject.uri in sources]
    for retry in sorted(retries, key=lambda receipt: (receipt.created, receipt.attempt)):
        samples = set(retry.shard.retry.samples) if retry.shard.retry is not None else set()
        found = [(reject, holder) for reject, holder in found if (reject.uri, reject.key) not in samples]
        found += [(reject, retry) for reject in retry.rejects if reject.key is not None]
    return found


def _retry_shards(
    base: Receipt, retries: list[Receipt], replaced: list[Reject], work: Work, job: EncodeJob
) -> list[Shard]:
    """Shards that encode the samples of `replaced` again: all rejects of these samples that stand now."""
    after = tuple(sorted({base.shard_id, *(receipt.shard_id for receipt in retries)}))
    uris = sorted({str(reject.uri) for reject in replaced})
    # Listed now: an object that was touched has another etag than in the receipt, and the same bytes.
    objects = [work.listed[uri] for uri in uris if uri in work.listed]
    groups = (
        [replace(base.shard, objects=tuple(objects))] if base.shard.kind == "tar" else group_files(objects, job.storage)
    )
    shards = []
    for group in groups:
        inside = {source.uri for source in group.objects}
        rejects = [reject for reject in replaced if reject.uri in inside]
        retry = Retry(
            samples=tuple(sorted({(str(reject.uri), str(reject.key)) for reject in rejects})),
            after=after,
            damaged=len({(reject.uri, reject.key) for reject in rejects if not reject.policy}),
            clips_rejected=sum(reject.clip is not None for reject in rejects),
        )
        shards.append(Shard(base.shard.kind, f"{group.name} (retry)", group.objects, retry))
    return shards


def _tell(work: Work, found: Counter[str], job: EncodeJob, wanted: tuple[str, ...] | None) -> None:
    if not found:
        if wanted is not None:
            work.notices.append("--retry-rejects: nothing is left to retry, earlier retries had it all")
        return
    total = sum(found.values())
    shown = ", ".join(f"{reason} {n}" for reason, n in found.most_common(REASONS_SHOWN))
    if wanted is not None:
        work.notices.append(f"--retry-rejects: {total} inputs of finished shards are encoded again ({shown})")
        return
    limits = job.limits()
    options = sorted({f"{LIMIT_OF_REASON[r]} is now {limits[LIMIT_OF_REASON[r]]:g}" for r in found})
    work.notices.append(
        f"{total} inputs of finished shards were rejected by limits that this run does not have ({shown}; "
        f"{', '.join(options)}); --retry-rejects encodes them"
    )

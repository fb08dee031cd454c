"""Rejects of finished shards that this run might encode: counted in a notice, and on request made into shards.

Takes `Work`, the job's limits and `retry_rejects`. Gives a notice, or shards whose `retry` names their samples. Reads only receipts that
may hold such rejects, and those of their retries.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.corpus import group_files
from pipeline.errors import ConfigError
from pipeline.ledger.receipts import Ledger
from pipeline.records import RetriedSample, Retry, Shard
from pipeline.units import quantity

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.driver.coverage import Work
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import Receipt, Reject, SourceObject
    from pipeline.storage import Store

# Reasons that depend on an option outside the fingerprint. A larger value of the option accepts more inputs.
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


def retry_work(store: Store, work: Work, job: EncodeJob) -> None:
    """Adds shards for the rejects that `job.retry_rejects` names; without it, a notice of how many inputs it would encode again.

    Raises:
        ConfigError: `retry_rejects` names a reason that no finished input was rejected for.
    """
    limits, wanted = job.limits(), job.retry_rejects
    _check_reasons(work, wanted or ())
    found: Counter[str] = Counter()
    suspects = [
        (work.overlaps.by_shard[shard], sources)
        for shard, sources in work.finished.items()
        if any(_may_retry(item, limits, wanted) for item in _with_retries(work, shard))
    ]
    keys = [[item.key] for base, _ in suspects for item in _with_retries(work, base.shard_id)]
    read = Ledger(store).read_all(keys)
    for base, sources in suspects:
        parts = [(item, next(read)) for item in _with_retries(work, base.shard_id)]
        receipts = [work.overlaps.counted(receipt) for _, receipt in parts if receipt is not None]
        if not receipts or receipts[0].receipt.shard_id != base.shard_id:
            continue  # deleted since it was listed
        valid = _valid_rejects(receipts, {source.uri for source in sources})
        again = [reject for reject, holder in valid if _retried(reject.reason, holder, limits, wanted)]
        found.update(reason for _, _, reason in {(reject.uri, reject.key, reject.reason) for reject in again})
        if wanted is not None:
            samples = {(reject.uri, reject.key) for reject in again}
            replaced = [reject for reject, _ in valid if (reject.uri, reject.key) in samples]
            work.retries += _shards(receipts, replaced, sources, job)
    _add_notice(work, found, job, wanted)


# Reasons of the reader that follow from the bytes: a retry rejects them again.
OF_BYTES = {
    "duplicate_key", "extra_video", "empty_video", "no_video", "truncated_shard", "unresolved_hardlink", "unresolved_symlink",
    "corrupt_header", "corrupt_compression", "unsupported_compression", "not_a_tar",
}  # fmt: skip


def _check_reasons(work: Work, wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    known = set(work.reasons())
    if not_retriable := sorted(set(wanted) & OF_BYTES):
        raise ConfigError(
            f"retry_rejects: {', '.join(not_retriable)} follow from the bytes of the tar alone; write the tar again, and the next run "
            "encodes it"
        )
    unknown = sorted(set(wanted) - known)
    if unknown and known:
        raise ConfigError(
            f"retry_rejects: no finished input was rejected as {', '.join(unknown)}; reasons of finished inputs: {', '.join(sorted(known))}"
        )


def _with_retries(work: Work, shard: str) -> list[ReceiptSummary]:
    return [work.overlaps.by_shard[shard], *work.overlaps.retries.get(shard, ())]


def _may_retry(item: ReceiptSummary, limits: dict[str, float], wanted: tuple[str, ...] | None) -> bool:
    reasons, then = _parsed(item.reasons), _parsed(item.limits)
    return any(reason in wanted if wanted else _laxer(reason, then, limits) for reason in reasons)


@lru_cache(1024)
def _parsed(text: str) -> dict[str, float]:
    """JSON of a summary, not to be changed. Most of 100,000 receipts have the same."""
    found: dict[str, float] = json.loads(text)
    return found


def _retried(reason: str, holder: Receipt, limits: dict[str, float], wanted: tuple[str, ...] | None) -> bool:
    return reason in wanted if wanted else _laxer(reason, holder.limits, limits)


def _laxer(reason: str, then: dict[str, float], now: dict[str, float]) -> bool:
    option = LIMIT_OF_REASON.get(reason)
    return option is not None and option in then and now[option] > then[option]


def _valid_rejects(receipts: list[CountedReceipt], uris: set[str]) -> list[tuple[Reject, Receipt]]:
    """Rejects of these sources that are still valid, each with its receipt. Rejects without a key cannot be retried."""
    return [
        (reject, part.receipt)
        for part in receipts
        for reject in part.receipt.rejects
        if reject.key is not None and reject.uri in uris and part.reject_counts(reject)
    ]


def _shards(
    receipts: list[CountedReceipt], replaced: list[Reject], listed: list[SourceObject], job: EncodeJob
) -> list[Shard]:
    """Shards that encode the samples of `replaced` again; `replaced` holds all valid rejects of these samples."""
    base = receipts[0].receipt
    after = tuple(sorted(part.receipt.shard_id for part in receipts[1:]))
    etags = {source.uri: source.etag for source in listed}
    objects = [source for source in base.shard.objects if source.uri in {reject.uri for reject in replaced}]
    groups = group_files(objects, job.storage) if base.shard.kind == "files" else [base.shard] * bool(objects)
    shards = []
    for group in groups:
        inside = {source.uri for source in group.objects}
        retry = Retry(
            base=base.shard_id,
            base_attempt=base.attempt,
            samples=_samples([reject for reject in replaced if reject.uri in inside]),
            after=after,
            etags=tuple(
                (source.uri, etags[source.uri]) for source in group.objects if etags[source.uri] != source.etag
            ),
        )
        shards.append(replace(group, name=f"{group.name} (retry)", retry=retry))
    return shards


def _samples(rejects: list[Reject]) -> tuple[RetriedSample, ...]:
    found: dict[tuple[str, str], RetriedSample] = {}
    for reject in rejects:
        name = str(reject.uri), str(reject.key)
        before = found.get(name, RetriedSample(*name, damaged=False, clips_rejected=0))
        damaged = before.damaged or not reject.policy
        found[name] = replace(before, damaged=damaged, clips_rejected=before.clips_rejected + reject.clips)
    return tuple(found[name] for name in sorted(found))


def _add_notice(work: Work, found: Counter[str], job: EncodeJob, wanted: tuple[str, ...] | None) -> None:
    if not found:
        if wanted is not None:
            work.notices.append("--retry-rejects: no finished input has such a reject that could be retried")
        return
    total = sum(found.values())
    shown = ", ".join(f"{reason} {n}" for reason, n in found.most_common(REASONS_SHOWN))
    if wanted is not None:
        work.notices.append(
            f"--retry-rejects: {quantity(total, 'input of finished shards is', 'inputs of finished shards are')} encoded again ({shown})"
        )
        return
    limits = job.limits()
    options = sorted({f"{LIMIT_OF_REASON[reason]} is now {limits[LIMIT_OF_REASON[reason]]:g}" for reason in found})
    work.notices.append(
        f"{quantity(total, 'input of finished shards was', 'inputs of finished shards were')} rejected by limits that "
        f"this run has raised ({shown}; {', '.join(options)}); --retry-rejects encodes them"
    )

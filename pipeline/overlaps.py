"""Which receipt counts for which source. Pure decisions on summaries of receipts: no I/O, no clock.

A source object (uri, etag, size) counts in one receipt of a fingerprint: the one with the lowest (created, attempt). Two runs with
other listings or groupings may both have encoded it; their rows are equal, because ids and latents are functions of source and
fingerprint, and readers leave out those of the later receipt. An object with the same URI and the same bytes under another etag is the
same source here, where both receipts know the hash of its bytes. A retry encodes samples that an earlier receipt rejected: it adds to that
receipt and never competes with it, only with other retries of the same sample that did not know of each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.summaries import UNKNOWN_CONTENT, source_id, uri_id

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import Receipt, Reject
    from pipeline.summaries import ReceiptSummary

Sample = tuple[str, str]  # uri of the source, key of the sample
Source = tuple[str, bytes]  # fingerprint, id of the source


@dataclass(frozen=True, slots=True)
class Hidden:
    """What of a receipt does not count because another receipt has it."""

    sources: frozenset[bytes] = frozenset()  # ids of whole sources that an earlier receipt has
    samples: frozenset[Sample] = frozenset()  # of a retry: those that an earlier retry has
    retried: frozenset[Sample] = frozenset()  # samples whose rejects a later retry replaces


@dataclass(frozen=True, slots=True)
class CountedReceipt:
    """A receipt and the part of it that counts."""

    receipt: Receipt
    hidden_uris: frozenset[str] = frozenset()
    hidden_samples: frozenset[Sample] = frozenset()
    retried: frozenset[Sample] = frozenset()

    def counts(self, uri: str, key: str) -> bool:
        """Whether rows of this sample count here."""
        return uri not in self.hidden_uris and (uri, key) not in self.hidden_samples

    def stands(self, reject: Reject) -> bool:
        """Whether a reject counts here: its sample does, and was not encoded again since."""
        sample = (str(reject.uri), str(reject.key))
        return self.counts(*sample) and sample not in self.retried

    @property
    def whole(self) -> bool:
        """All rows count."""
        return not self.hidden_uris and not self.hidden_samples

    @property
    def superseded(self) -> bool:
        """Nothing counts: earlier receipts have all of it."""
        shard = self.receipt.shard
        if shard.retry is not None:
            return set(shard.retry.samples) <= self.hidden_samples
        return {source.uri for source in shard.objects} <= self.hidden_uris


def hidden_parts(summaries: Iterable[ReceiptSummary]) -> dict[str, Hidden]:
    """By shard id, what of each receipt does not count; receipts that count whole are not in it."""
    ordered = sorted(summaries, key=lambda item: item.precedence)
    owner: dict[Source, str] = {}  # by source and by content: shard id of the receipt that counts
    sources: dict[str, set[bytes]] = defaultdict(set)
    samples: dict[str, set[Sample]] = defaultdict(set)
    retries: dict[Source, dict[Sample, list[ReceiptSummary]]] = defaultdict(lambda: defaultdict(list))  # that count
    for item in ordered:
        retry = item.retried()
        if retry is None:
            for source, content in zip(item.source_ids(), item.content_ids(), strict=True):
                names = [source] if content == UNKNOWN_CONTENT else [source, content]
                if any(owner.get((item.fingerprint, name), item.shard_id) != item.shard_id for name in names):
                    sources[item.shard_id].add(source)
                for name in names:
                    owner.setdefault((item.fingerprint, name), item.shard_id)
            continue
        source_of = dict(zip(item.uri_ids(), item.source_ids(), strict=True))
        for sample in retry.samples:
            before = retries[item.fingerprint, source_of[uri_id(sample[0])]][sample]
            if {other.shard_id for other in before} <= set(retry.after):
                before.append(item)
            else:
                samples[item.shard_id].add(sample)
    retried = _retried(ordered, retries)
    return {
        shard_id: Hidden(frozenset(sources[shard_id]), frozenset(samples[shard_id]), frozenset(retried[shard_id]))
        for shard_id in sources.keys() | samples.keys() | retried.keys()
    }


def _retried(
    ordered: list[ReceiptSummary], retries: dict[Source, dict[Sample, list[ReceiptSummary]]]
) -> dict[str, set[Sample]]:
    """By shard id, samples whose last word is in another receipt."""
    found: dict[str, set[Sample]] = defaultdict(set)
    for item in ordered if retries else ():
        for source in item.source_ids():
            for sample, counted_retries in retries.get((item.fingerprint, source), {}).items():
                if counted_retries and counted_retries[-1].shard_id != item.shard_id:
                    found[item.shard_id].add(sample)
    return found


def counted(receipt: Receipt, hidden: dict[str, Hidden]) -> CountedReceipt:
    """`receipt` with the part of it that counts."""
    found = hidden.get(receipt.shard_id)
    if found is None:
        return CountedReceipt(receipt)
    uris = frozenset(
        source.uri for source in receipt.shard.objects if found.sources and source_id(source) in found.sources
    )
    return CountedReceipt(receipt, uris, found.samples, found.retried)

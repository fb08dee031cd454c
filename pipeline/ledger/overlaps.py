"""Ownership of sources by receipts. Takes receipt summaries; decides which receipt counts for each source. No I/O, no clock.

1. A source object (uri, etag, size) counts in one receipt of a fingerprint, its owner: the one with the lowest (created, attempt). Two runs
   with different listings or groupings may both encode it. Their rows are equal, because ids and latents are functions of source and
   fingerprint; readers leave out those of the later receipt. An object with the same URI and bytes but another etag is the same source if
   both receipts have the hash of its bytes.
2. If neither the first attempt nor a retry encoded a clip of a plain file, it stops counting when a later receipt has another version.
3. A retry completes one receipt, its base. It counts for a sample while the base counts for the sample's source. If two retries of one
   sample ran independently, the first counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.ledger.copies import NO_COPIES
from pipeline.ledger.summary import EMPTY, UNKNOWN_CONTENT, source_id, uri_id
from pipeline.ledger.takedowns import NONE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.ledger.copies import Copies
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import Receipt, Reject, VideoCounts

Sample = tuple[str, str]  # uri of the source, key of the sample
Source = tuple[str, bytes]  # fingerprint, id of the source or of its content


@dataclass(slots=True)
class Hidden:
    """Parts of a receipt that another receipt counts for."""

    sources: set[bytes] = field(default_factory=set)  # ids of whole sources
    samples: set[Sample] = field(default_factory=set)  # of a retry
    retried: set[Sample] = field(default_factory=set)  # samples whose rejects a later retry replaces


@dataclass(frozen=True, slots=True)
class CountedReceipt:
    """A receipt and the part of it that counts."""

    receipt: Receipt
    hidden_uris: frozenset[str] = frozenset()
    hidden_samples: frozenset[Sample] = frozenset()
    retried: frozenset[Sample] = frozenset()
    takedowns: Takedowns = NONE  # those that touch this receipt; counts of inputs are not changed by them
    # In a snapshot: its data files, by key, with positions of rows that do not count. None: not in a snapshot.
    positions: dict[str, frozenset[int]] | None = None
    copies: Copies = NO_COPIES  # where `lathe compact` put rows of its files

    def counts(self, uri: str, key: str) -> bool:
        """Whether rows of this sample count here."""
        return uri not in self.hidden_uris and (uri, key) not in self.hidden_samples

    def reject_counts(self, reject: Reject) -> bool:
        """Whether a reject counts: its sample counts here and no later retry replaced it."""
        sample = (str(reject.uri), str(reject.key))
        return self.counts(*sample) and sample not in self.retried

    def videos(self) -> dict[str, VideoCounts]:
        """Source videos by length and size, `encoded` and `rejected`, and by bucket clips that were `lost` and videos that were `refused`.

        Without encoded samples that are not recorded: by an earlier version, or in a retry of which another has a part.
        """
        receipt = self.receipt
        found: dict[str, Counter[str]] = {name: Counter() for name in ("encoded", "rejected", "lost", "refused")}
        recorded = () if receipt.videos is None or self.hidden_samples else receipt.videos
        for source, counts in zip(receipt.shard.objects, recorded, strict=False):
            if source.uri not in self.hidden_uris:
                found["encoded"].update(counts)
        for reject in receipt.rejects:
            if self.reject_counts(reject):
                found["rejected"].update(reject.video)
                found["lost" if reject.clips else "refused"].update(reject.buckets)
        return {name: dict(counts) for name, counts in found.items() if counts}

    @property
    def whole(self) -> bool:
        """All rows count."""
        return not self.hidden_uris and not self.hidden_samples and not self.takedowns

    @property
    def superseded(self) -> bool:
        """Nothing counts: other receipts have all of it."""
        shard = self.receipt.shard
        if shard.retry is not None:
            return all((sample.uri, sample.key) in self.hidden_samples for sample in shard.retry.samples)
        return all(source.uri in self.hidden_uris for source in shard.objects)


class Overlaps:
    """Owners of the sources of an output, by the rules of the module, from one summary per shard."""

    def __init__(
        self, summaries: Iterable[ReceiptSummary], takedowns: Takedowns = NONE, copies: Copies = NO_COPIES
    ) -> None:
        self.takedowns, self.copies = takedowns, copies
        self._hidden: dict[str, Hidden] = defaultdict(Hidden)
        self._owner: dict[Source, str] = {}  # by source and by content: shard id
        ordered = sorted(summaries, key=lambda item: item.precedence)
        self.by_shard = {item.shard_id: item for item in ordered}
        self.retries: dict[str, list[ReceiptSummary]] = defaultdict(list)  # by base; those that count for a sample
        bases = [item for item in ordered if item.retry is None and item.same_as is None]
        for item in bases:
            self._own(item)
        for item in ordered:
            if item.retry is not None:
                self._place_retry(item)
        self._drop_replaced(bases)

    def owner(self, fingerprint: str, source: bytes) -> ReceiptSummary:
        """The receipt that counts for a source that a receipt of this fingerprint names."""
        return self.by_shard[self._owner[fingerprint, source]]

    def hides(self, item: ReceiptSummary, source: bytes) -> bool:
        """Whether `item` does not count for one of its sources."""
        return item.shard_id in self._hidden and source in self._hidden[item.shard_id].sources

    def counted(self, receipt: Receipt) -> CountedReceipt:
        """`receipt` with the part of it that counts."""
        found = self._hidden.get(receipt.shard_id)
        takedowns = self.takedowns if self.takedowns.touches(receipt) else NONE
        if found is None:
            return CountedReceipt(receipt, takedowns=takedowns, copies=self.copies)
        uris = frozenset(
            source.uri for source in receipt.shard.objects if found.sources and source_id(source) in found.sources
        )
        samples, retried = frozenset(found.samples), frozenset(found.retried)
        return CountedReceipt(receipt, uris, samples, retried, takedowns, copies=self.copies)

    def forget_summaries(self) -> None:
        """Frees the summaries (about 1 kB per receipt). Only `counted` may be called afterwards."""
        self.by_shard.clear()
        self.retries.clear()
        self._owner.clear()

    def hide(self, item: ReceiptSummary, source: bytes, uri: bytes) -> None:
        """Hides one source of a base receipt and of its retries, because another version of the input counts."""
        self._hidden[item.shard_id].sources.add(source)
        for retry in self.retries.get(item.shard_id, ()):
            if uri in retry.uri_ids():
                self._hidden[retry.shard_id].samples |= {one for one in _samples(retry) if uri_id(one[0]) == uri}

    def state(self, item: ReceiptSummary) -> bytes:
        """8-byte hash of the part of a receipt that counts: equal for one attempt as long as the same rows are shown."""
        found = self._hidden.get(item.shard_id)
        takedowns = self.takedowns.keys_for(item.uri_ids()) if self.takedowns else []
        if found is None and not takedowns:
            return whole_state(item.attempt)
        found = found or Hidden()
        parts = [sorted(map(bytes.hex, found.sources)), sorted(found.samples), sorted(found.retried), takedowns]
        if found.retried:  # earlier snapshots recorded the rejects of such receipts as if none had been retried
            parts.append("rejects")
        return _digest(item.attempt, json.dumps(parts))

    def _own(self, item: ReceiptSummary) -> None:
        for source, content in zip(item.source_ids(), item.content_ids(), strict=True):
            names = [(item.fingerprint, name) for name in (source, content) if name != UNKNOWN_CONTENT]
            owner = next((self._owner[name] for name in names if name in self._owner), item.shard_id)
            for name in names:
                self._owner.setdefault(name, owner)
            if owner != item.shard_id:
                self._hidden[item.shard_id].sources.add(source)

    def _drop_replaced(self, bases: list[ReceiptSummary]) -> None:
        last: dict[Source, bytes] = {}  # by URI: source with the latest owner
        empty: list[tuple[ReceiptSummary, bytes, bytes]] = []
        for item in bases:
            for position, (uri, source) in enumerate(zip(item.uri_ids(), item.source_ids(), strict=True)):
                if self._owner[item.fingerprint, source] == item.shard_id:
                    last[item.fingerprint, uri] = source
                    if item.marks and item.marks[position] & EMPTY:
                        empty.append((item, uri, source))
        for item, uri, source in empty:
            tries = [(retry, retry.positions()[uri]) for retry in self.retries[item.shard_id] if uri in retry.uri_ids()]
            recovered = any(not retry.marks[position] & EMPTY for retry, position in tries)
            if last[item.fingerprint, uri] != source and not recovered:
                self.hide(item, source, uri)

    def _place_retry(self, item: ReceiptSummary) -> None:
        retry = item.retried()
        if retry is None:
            raise ValueError(f"{item.key} is not the receipt of a retry")
        base = self.by_shard.get(retry.base)
        if base is not None and base.attempt != retry.base_attempt:
            base = None  # the shard was encoded again later, including the retried samples
        sources = {} if base is None else dict(zip(base.uri_ids(), base.source_ids(), strict=True))
        earlier = self.retries[retry.base]
        counts = False
        for sample in ((found.uri, found.key) for found in retry.samples):
            source = sources.get(uri_id(sample[0]))
            rivals = [other for other in earlier if sample in _samples(other) - self._hidden[other.shard_id].samples]
            known = {other.shard_id for other in rivals} <= set(retry.after)
            if base is None or source is None or self.hides(base, source) or not known:
                self._hidden[item.shard_id].samples.add(sample)
                continue
            counts = True
            for other in (base, *rivals):
                self._hidden[other.shard_id].retried.add(sample)
        if counts:
            earlier.append(item)


def whole_state(attempt: str) -> bytes:
    """`Overlaps.state` of a receipt of which all rows count."""
    return _digest(attempt, "")


def _digest(attempt: str, parts: str) -> bytes:
    return hashlib.blake2b(f"{attempt}\0{parts}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _samples(item: ReceiptSummary) -> set[Sample]:
    retry = item.retried()
    return set() if retry is None else {(sample.uri, sample.key) for sample in retry.samples}

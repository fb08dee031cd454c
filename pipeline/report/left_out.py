"""Rejects with examples, and the cost of encoding, from the receipts of a snapshot.

Counts by reason are the record's, exact. Stages, examples and times are read from receipts: all of them up to `MOST_RECEIPTS`, else as
many, evenly spread, with times scaled up. Samples that were taken down are not named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from pipeline.format.columns import storable
from pipeline.format.index import IndexRow
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.report.source_videos import bucket_losses, source_videos
from pipeline.report.values import Cost, Example, LeftOut, LostSource, RejectReason
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pyarrow as pa

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import Receipt, Reject
    from pipeline.storage import Store

MOST_RECEIPTS = 5000
EXAMPLES = 5  # of a reason
SOURCES = 10
TEXT = 300  # characters of a message, key or URI
NO_CAPTION = "no_caption"


@dataclass(slots=True)
class _Found:
    """Sums over the receipts that were read."""

    receipts: int = 0
    core_s: float = 0.0
    gpu_s: float = 0.0
    first: str | None = None
    last: str | None = None
    stages: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    policies: dict[str, bool] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=lambda: defaultdict(list))
    by_source: Counter[str] = field(default_factory=Counter)
    samples: dict[str, int] = field(default_factory=dict)  # of tars, by URI

    def add(self, receipt: Receipt, retried: set[tuple[str, str, str]], takedowns: Takedowns) -> None:
        timings = receipt.timings
        device = str(receipt.notes.get("environment", {}).get("device", "cpu"))
        on_gpu = device.startswith("cuda")
        self.receipts += 1
        self.core_s += timings.decode_cpu_s + (0.0 if on_gpu else timings.encode_s)
        self.gpu_s += timings.encode_s if on_gpu else 0.0
        self.first = min(self.first or receipt.created, receipt.created)
        self.last = max(self.last or receipt.created, receipt.created)
        if receipt.shard.kind == "tar" and receipt.shard.retry is None:
            self.samples[receipt.shard.objects[0].uri] = receipt.counts.samples
        for reject in receipt.rejects:
            if (receipt.shard_id, str(reject.uri), str(reject.key)) not in retried:
                self._add_reject(reject, takedowns)

    def _add_reject(self, reject: Reject, takedowns: Takedowns) -> None:
        self.stages[reject.reason][reject.stage] += 1
        self.policies[reject.reason] = reject.policy
        if is_taken(takedowns, reject):
            return
        if reject.uri is not None:
            self.by_source[reject.uri] += 1
        examples = self.examples[reject.reason]
        if len(examples) < EXAMPLES:
            examples.append(Example(_cut(reject.uri), _cut(reject.key), str(_cut(reject.message))))


def left_out(
    store: Store, snapshot: Snapshot, takedowns: Takedowns, parent: Snapshot | None
) -> tuple[LeftOut, Cost, list[str]]:
    """What a snapshot does not have, what encoding took, and notices.

    Raises:
        OutputError: a table of the snapshot or a receipt that cannot be read.
    """
    table = Snapshots(store).table(snapshot, "receipts", ["shard_id", "own_shard"])
    total = table.num_rows
    own, others = (sorted(table.filter(mask)["shard_id"].to_pylist()) for mask in _masks(table["own_shard"]))
    own, others = _spread(own), _spread(others)
    keys = Ledger(store).keys_by_shard()
    retried = {
        (receipt.shard.retry.base, sample.uri, sample.key)
        for receipt in _read(store, keys, others)
        if receipt.shard.retry is not None
        for sample in receipt.shard.retry.samples
    }
    found = _Found()
    for receipt in _read(store, keys, [*own, *others]):
        found.add(receipt, retried, takedowns)
    counts = snapshot.counts
    applied = set(snapshot.takedowns)
    result = LeftOut(
        **{name: counts.get(name, 0) for name in ("samples", "encoded", "rejected", "damaged", "clips_rejected")},
        reasons=_reasons(snapshot, found),
        sources=tuple(
            LostSource(str(_cut(uri)), n, found.samples.get(uri)) for uri, n in found.by_source.most_common(SOURCES)
        ),
        losses=bucket_losses(snapshot),
        videos=source_videos(snapshot),
        buckets=_fewer(snapshot, parent),
        without_caption=snapshot.warnings.get(NO_CAPTION, 0),
        warnings=snapshot.warnings,
        open_shards=snapshot.num_open,
        takedowns=len(applied),
        newer_takedowns=len({item.key for item in takedowns.records} - applied),
        receipts=total,
        receipts_read=found.receipts,
    )
    scale = total / found.receipts if found.receipts else 1.0
    cost = Cost(found.core_s * scale, found.gpu_s * scale, total, found.receipts, found.first, found.last)
    notices = []
    if found.receipts < total:
        notices.append(
            f"{found.receipts} of {total} receipts were read: stages, examples and source objects of rejects are of these, and "
            "seconds of encoding are scaled up from them"
        )
    return result, cost, notices


def is_taken(takedowns: Takedowns, reject: Reject) -> bool:
    """Whether the sample of a reject is taken down: it must not be named."""
    if not takedowns or reject.uri is None:
        return False
    sample = storable(reject.uri), storable(reject.key or "")
    return takedowns.hides(IndexRow("", 0, 0, 0, "", None, None, None, (), "", "", 0, *sample, "", None))


def _masks(own_shard: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    return own_shard, pc.invert(own_shard)


def _spread(shards: list[str]) -> list[str]:
    most = MOST_RECEIPTS
    return shards if len(shards) <= most else [shards[i * len(shards) // most] for i in range(most)]


def _read(store: Store, keys: dict[str, list[str]], shards: Iterable[str]) -> Iterator[Receipt]:
    """Receipts that are there, one at a time: five thousand of them may take hundreds of megabytes."""
    workers = 16 if is_remote(store.root) else 1
    read = Ledger(store).read_all((keys[name] for name in shards if name in keys), workers)
    return (receipt for receipt in read if receipt is not None)


def _reasons(snapshot: Snapshot, found: _Found) -> tuple[RejectReason, ...]:
    samples = max(snapshot.counts.get("samples", 0), 1)
    return tuple(
        RejectReason(
            reason=reason,
            count=count,
            share=count / samples,
            policy=found.policies.get(reason),
            stages=tuple(name for name, _ in found.stages[reason].most_common()),
            examples=tuple(found.examples[reason]),
        )
        for reason, count in sorted(snapshot.rejects.items(), key=lambda item: (-item[1], item[0]))
        if count
    )


def _fewer(snapshot: Snapshot, parent: Snapshot | None) -> dict[str, int]:
    if parent is None:
        return {}
    before = {name: item["rows"] for name, item in parent.buckets.items()}
    fewer = {name: rows - snapshot.buckets.get(name, {"rows": 0})["rows"] for name, rows in before.items()}
    return dict(sorted(((name, n) for name, n in fewer.items() if n > 0), key=lambda item: (-item[1], item[0])))


def _cut(text: str | None) -> str | None:
    if text is None:
        return None
    text = storable(text)
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"
